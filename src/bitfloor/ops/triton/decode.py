"""Packed codes, zero-points and offsets as they lie (docs/format.md), inside Triton's kernels.

Nothing here is launched: these are the functions that the kernels of this folder share. A *line* is 16 dwords, one for
each row of a row block, and tensors of lines keep the rows in their last dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a segment is shifted by; the numbers of bitfloor.ops.form. A variant is three times a width plus one of them.
PACKED = tl.constexpr(0)
OFFSET = tl.constexpr(1)
# Tables of pieces of segments (bitfloor.ops.launch): so many numbers describe one.
FIELDS = tl.constexpr(13)


@triton.jit  # type: ignore[untyped-decorator]
def lines_of(place, here, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """All lines of tiles: ``place`` points to the dwords of each tile's first line. Those that a width lacks are the
    first again."""
    l0 = tl.load(place, mask=here, other=0)
    l1 = l0
    l2 = l0
    l3 = l0
    l4 = l0
    l5 = l0
    l6 = l0
    l7 = l0
    if BITS >= 2:
        l1 = tl.load(place + 16, mask=here, other=0)
    if BITS >= 3:
        l2 = tl.load(place + 32, mask=here, other=0)
    if BITS >= 4:
        l3 = tl.load(place + 48, mask=here, other=0)
    if BITS >= 5:
        l4 = tl.load(place + 64, mask=here, other=0)
    if BITS >= 6:
        l5 = tl.load(place + 80, mask=here, other=0)
    if BITS == 8:
        l6 = tl.load(place + 96, mask=here, other=0)
        l7 = tl.load(place + 112, mask=here, other=0)
    return l0, l1, l2, l3, l4, l5, l6, l7


@triton.jit  # type: ignore[untyped-decorator]
def line(l0, l1, l2, l3, l4, l5, l6, l7, L: tl.constexpr):  # type: ignore[no-untyped-def]
    """Line ``L``."""
    found = l0
    if L == 1:
        found = l1
    if L == 2:
        found = l2
    if L == 3:
        found = l3
    if L == 4:
        found = l4
    if L == 5:
        found = l5
    if L == 6:
        found = l6
    if L == 7:
        found = l7
    return found


@triton.jit  # type: ignore[untyped-decorator]
def quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS: tl.constexpr, Q: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of the columns ``4 Q ... 4 Q + 3``, one in each byte. Shifts copy the sign in, and masks drop it."""
    if BITS == 1:
        found = (l0 >> Q) & 0x01010101
    elif BITS == 2:
        found = (line(l0, l1, l2, l3, l4, l5, l6, l7, Q // 4) >> (2 * (Q % 4))) & 0x03030303
    elif BITS == 3:
        if Q < 6:
            found = (line(l0, l1, l2, l3, l4, l5, l6, l7, Q // 2) >> (3 * (Q % 2))) & 0x07070707
        else:
            found = (line(l0, l1, l2, l3, l4, l5, l6, l7, Q - 6) >> 6) & 0x03030303
            found |= (l2 >> (Q - 2)) & 0x04040404
    elif BITS == 4:
        found = (line(l0, l1, l2, l3, l4, l5, l6, l7, Q // 2) >> (4 * (Q % 2))) & 0x0F0F0F0F
    elif BITS == 5:
        if Q < 5:
            found = line(l0, l1, l2, l3, l4, l5, l6, l7, Q) & 0x1F1F1F1F
        else:
            found = (line(l0, l1, l2, l3, l4, l5, l6, l7, Q - 5) >> 5) & 0x07070707
            if Q == 5:
                found |= (l3 >> 2) & 0x18181818
            elif Q == 6:
                found |= (l4 >> 3) & 0x18181818
            else:
                found |= ((l4 >> 2) & 0x08080808) | ((l3 >> 3) & 0x10101010)
    elif BITS == 6:
        if Q < 6:
            found = line(l0, l1, l2, l3, l4, l5, l6, l7, Q) & 0x3F3F3F3F
        else:
            low = line(l0, l1, l2, l3, l4, l5, l6, l7, 3 * (Q - 6))
            middle = line(l0, l1, l2, l3, l4, l5, l6, l7, 3 * (Q - 6) + 1)
            high = line(l0, l1, l2, l3, l4, l5, l6, l7, 3 * (Q - 6) + 2)
            found = ((low >> 6) & 0x03030303) | ((middle >> 4) & 0x0C0C0C0C) | ((high >> 2) & 0x30303030)
    else:
        found = line(l0, l1, l2, l3, l4, l5, l6, l7, Q)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def zeros_of(place, row, here, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Packed zero-points: ``place`` points to the first 16 bits of the stream of a row block's group, ``row`` is 0 to
    15. int32."""
    bit = row * BITS
    low = tl.load(place + bit // 16, mask=here, other=0).to(tl.int32) & 0xFFFF
    if BITS == 3 or BITS == 5 or BITS == 6:  # these can reach into the next 16 bits, which the last rows do not have
        high = tl.load(place + tl.minimum(bit // 16 + 1, BITS - 1), mask=here, other=0).to(tl.int32) & 0xFFFF
        low |= high << 16
    return (low >> (bit % 16)) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def weights_of(  # type: ignore[no-untyped-def]
    codes, scale, shift, channel_scale, block, r, known, tile, here, columns, at, lines, scale_at, scale_groups,
    shift_at, shift_groups, group, constant, channel_at,
    N: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Weights of some rows and tiles of a segment, float32 ``[N, 32 T]``, each operation rounded as the format says.

    block [N] int64, r [N], known [N]: row block, row in it, and whether it is one; tile [T], here [T]: in the segment.
    group: tiles of a group if ALIGNED, else columns; shift: zero-points as 16-bit words, or offsets.
    """
    b = block[:, None]
    u = tile[None, :]
    where = known[:, None] & here[None, :]
    l0, l1, l2, l3, l4, l5, l6, l7 = lines_of(codes + (b * lines + at + u * BITS) * 16 + r[:, None], where, BITS)
    q0 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 0)
    q1 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 1)
    q2 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 2)
    q3 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 3)
    q4 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 4)
    q5 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 5)
    q6 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 6)
    q7 = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, 7)
    quads = tl.join(tl.join(tl.join(q0, q4), tl.join(q2, q6)), tl.join(tl.join(q1, q5), tl.join(q3, q7)))
    quads = quads.reshape(N, T, 8)
    byte = (quads[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]) & 0xFF
    # 2^23 plus a byte, as bits: converting is far slower.
    raised = (byte | 0x4B000000).to(tl.float32, bitcast=True).reshape(N, T, 32)
    column = tile[:, None] * 32 + tl.arange(0, 32)[None, :]
    if ALIGNED:
        k = (tile // group)[None, :, None]
        given = where[:, :, None]
    else:
        k = (column // group)[None, :, :]
        given = where[:, :, None] & (column < columns)[None, :, :]
    b = b[:, :, None]
    row = r[:, None, None]
    s = tl.load(scale + (b * scale_groups + scale_at + k) * 16 + row, mask=given, other=0.0).to(tl.float32)
    if KIND == PACKED:
        # Both this and the format's order of operations are exact, so the bits are the same.
        z = zeros_of(shift + b * shift_groups + shift_at + k * BITS, row, given, BITS).to(tl.float32)
        w = (raised - (z + 8388608.0)) * s
    elif KIND == OFFSET:
        o = tl.load(shift + (b * shift_groups + shift_at + k) * 16 + row, mask=given, other=0.0).to(tl.float32)
        w = (raised - 8388608.0) * s + o
    else:
        w = (raised - 8388608.0) * s + (-constant * s)
    if SCALED:
        place = channel_at + column
        c = tl.load(channel_scale + place, mask=(column < columns) & (place >= 0), other=1.0)
        w = w * c.to(tl.float32)[None, :, :]
    return w.reshape(N, T * 32)

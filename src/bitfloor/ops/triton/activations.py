"""The input side on a GPU: order, rotation and channel scales, and ``x`` as planes of signed bytes.

A plane holds a byte for every stored column and, for each tile of 32 columns, one step:

    x[c] = step * (n0[c] + n1[c] / 254 + n2[c] / 254^2),        step = max|x| / 127,   every n within -127 ... 127

One plane is what int8 activations are, with the blocks that :mod:`bitfloor.ops.packed_reference` defines. Three planes
are ``x`` in float: with blocks of a tile the rest is below 1e-7 of the largest of 32 neighbours, the size of what one
float32 operation drops. All sums of products of codes and planes are exact, so they depend on no order.

What a product needs of eight tiles lies together in one *record* of dwords: for each plane eight quads of columns,
eight tiles each; then for each plane the sums of eight tiles; then their steps: ``8 * (9 * planes + 1)`` dwords.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # adding and subtracting it rounds half to even, up to 2^22
LEAST = tl.constexpr(1e-30)  # what is smaller counts as nothing
LARGEST = tl.constexpr(3.4028234663852886e38)
FINER = tl.constexpr(254.0)


@triton.jit  # type: ignore[untyped-decorator]
def _entry(index, at, here, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unsigned entries of an order that is stored in 1, 2 or 4 bytes, and given as signed ones."""
    found = tl.load(index + at, mask=here, other=0).to(tl.int32)
    if BYTES == 1:
        found &= 0xFF
    if BYTES == 2:
        found &= 0xFFFF
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _signs(N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sylvester's matrix ``[N, N]`` of ones and minus ones: the parity of the ones in ``i & j``."""
    both = tl.arange(0, N)[:, None] & tl.arange(0, N)[None, :]
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return 1.0 - 2.0 * (both & 1).to(tl.float32)


@triton.jit(do_not_specialize=["columns"])  # type: ignore[untyped-decorator]
def rotate_kernel(  # type: ignore[no-untyped-def]
    x, channels, blocks, out, columns, BYTES: tl.constexpr, A: tl.constexpr, B: tl.constexpr
):
    """``x P R``, one block of columns of one row a program: ``H_AB = H_A (x) H_B``. A short block is the corner of a
    whole one."""
    start = tl.load(blocks + 2 * tl.program_id(1))
    size = tl.load(blocks + 2 * tl.program_id(1) + 1)
    i = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    here = i < size
    source = start + i
    if BYTES:
        source = _entry(channels, source, here, BYTES)
    row = tl.program_id(0).to(tl.int64) * columns
    inside = (source >= 0) & (source < columns)
    v = tl.load(x + row + source, mask=here & inside, other=0.0).to(tl.float32)
    v = tl.where(here & (inside == 0), float("nan"), v)
    v = tl.sum(_signs(A)[:, :, None] * v[None, :, :], 1)
    v = tl.sum(v[:, :, None] * _signs(B)[None, :, :], 1)
    tl.store(out + row + start + i, v * tl.math.rsqrt(size.to(tl.float32)), mask=here)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["columns", "width", "unit", "records", "programs"]
)
def input_kernel(  # type: ignore[no-untyped-def]
    x, order, channels, channel_scale, units, out, counters, columns, width, unit, records, programs,
    ORDER: tl.constexpr, CHANNELS: tl.constexpr, SCALED: tl.constexpr, STORED: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Four tiles of a row of ``x [n, width]`` in stored order: as floats, padded, for no planes, else as planes.

    units: for every program its first tile, first stored column, columns, first channel scale (below 0: none), tiles
        that share a step. ORDER, CHANNELS: bytes of an entry, 0 for none. STORED: ``x`` is in stored order, padded.
    counters: ``programs`` numbers that this kernel sets to zero for the next one.
    """
    entry = units + 5 * tl.program_id(1)
    m = tl.program_id(0).to(tl.int64)
    first = tl.load(entry)
    own = tl.load(entry + 2)
    t = tl.arange(0, 4)
    column = t[:, None] * 32 + tl.arange(0, 32)[None, :]
    here = column < own
    source = (first * 32 if STORED else tl.load(entry + 1)) + column
    if ORDER:
        source = _entry(order, source // unit, here, ORDER) * unit + source % unit
    inside = (source >= 0) & (source < width)
    if CHANNELS:
        source = _entry(channels, source, here & inside, CHANNELS)
        inside = inside & (source < width)
    v = tl.load(x + m * width + source, mask=here & inside, other=0.0).to(tl.float32)
    # An order that names a channel that is not there was damaged: what comes of it is no number.
    v = tl.where(here & (inside == 0), float("nan"), v)
    if SCALED:
        place = tl.load(entry + 3) + column
        v *= tl.load(channel_scale + place, mask=here & (place >= 0), other=1.0).to(tl.float32)
    if PLANES == 0:
        tl.store(out + m * columns + first * 32 + column, v, mask=t[:, None] * 32 < own)
    else:
        if (tl.program_id(1) == 0) & (m == 0):
            for begin in range(0, programs, 128):
                i = begin + tl.arange(0, 128)
                tl.store(counters + i, tl.zeros([128], tl.int32), mask=i < programs)
        _planes(v, first, own, tl.load(entry + 4), out + m * records * (8 * (9 * PLANES + 1)), PLANES)


@triton.jit  # type: ignore[untyped-decorator]
def _planes(v, first, own, share, out, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round ``v [4, 32]`` and store planes, sums and steps; ``share`` tiles have one step."""
    size = tl.abs(v)
    odd = tl.max((size <= LARGEST).to(tl.int32) ^ 1, 1)
    v = tl.where(odd[:, None] > 0, 0.0, v)
    together = (tl.arange(0, 4)[:, None] // share) == (tl.arange(0, 4)[None, :] // share)
    top = tl.max(tl.where(together, tl.max(tl.abs(v), 1)[None, :], 0.0), 1)
    odd = tl.max(tl.where(together, odd[None, :], 0), 1)
    some = top >= LEAST
    whole = tl.full([4], 127.0, tl.float32)
    by = tl.where(some, tl.math.div_rn(whole, tl.where(some, top, 1.0)), 0.0)
    step = tl.where(some, tl.math.div_rn(top, whole), 0.0)
    step = tl.where(odd > 0, float("nan"), step)
    t = tl.arange(0, 4)
    tile = first + t
    there = t * 32 < own
    place = out + (tile // 8) * (8 * (9 * PLANES + 1)) + tile % 8
    quads = place[:, None] + 8 * tl.arange(0, 8)[None, :]
    rest = v * by[:, None]
    for p in tl.static_range(PLANES):
        n = (rest + MAGIC) - MAGIC
        rest = (rest - n) * FINER
        byte = (n.to(tl.int32) & 0xFF).reshape(4, 8, 4) << (8 * tl.arange(0, 4))[None, None, :]
        tl.store(quads + 64 * p, tl.sum(byte, 2), mask=there[:, None])
        tl.store(place + 64 * PLANES + 8 * p, tl.sum(n.to(tl.int32), 1), mask=there)
    tl.store(place + 72 * PLANES, step.to(tl.int32, bitcast=True), mask=there)

"""Few rows of ``x`` times a packed matrix: codes are multiplied as they lie, four at a time, with ``x`` in bytes.

A dword of a line is four codes of one row, and with a mask the operand of the GPU's product of four bytes; ``x`` is
planes of bytes (:mod:`bitfloor.ops.triton.activations`). A program has some row blocks and a slice of the columns: a
lane reads 16 bytes of a tile, four rows, and sums its tiles; at the end lanes are added up, and slices, in their order.
Sums within a tile are whole numbers; those of tiles are float32, in an order that follows from the shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitfloor.ops.triton.decode import FIELDS, OFFSET, PACKED, lines_of, quad, zeros_of

# 1.5 * 2^23, as bits and as a number: adding a whole number up to 2^22 to the first gives the bits of their sum.
MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
FINER = tl.constexpr(254.0)  # a plane's step is so much finer than that of the plane before


@triton.jit  # type: ignore[untyped-decorator]
def _dot4(codes, x, total, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` plus the products of four unsigned bytes with four signed ones."""
    if ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for j in tl.static_range(4):
            total += ((codes >> (8 * j)) & 0xFF) * ((x << (24 - 8 * j)) >> 24)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _chunk(  # type: ignore[no-untyped-def]
    total, codes, scale, shift, planes, m, count, records, block, known, at, first, tile, here,
    group, lines, scale_groups, shift_groups, scale_at, shift_at, constant,
    M: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """What some tiles of one segment add to ``total [M, R, T, 16]``.

    tile [T]: in the segment; here [T]; m [M, 1]: rows of x; block [R] int64; known [R]
    """
    r = tl.arange(0, 16)[None, None, None, :]
    there = (m < count) & here[None, :]
    where = known[None, :, None, None] & here[None, None, :, None]
    b = block[None, :, None, None]
    u = tile[None, None, :, None]
    k = group[None, None, :, None]
    l0, l1, l2, l3, l4, l5, l6, l7 = lines_of(codes + (b * lines + at + u * BITS) * 16 + r, where, BITS)
    s = tl.load(scale + (b * scale_groups + scale_at + k) * 16 + r, mask=where, other=0.0).to(tl.float32)
    # All that is known of eight tiles of a row of x lies together, see bitfloor.ops.triton.activations.
    g = (first + tile)[None, :]
    x = planes + (m * records + g // 8) * (8 * (9 * PLANES + 1)) + g % 8
    sum0 = tl.load(x + 64 * PLANES, mask=there, other=0)[:, None, :, None]
    sum1 = sum0
    sum2 = sum0
    if PLANES == 3:
        sum1 = tl.load(x + 64 * PLANES + 8, mask=there, other=0)[:, None, :, None]
        sum2 = tl.load(x + 64 * PLANES + 16, mask=there, other=0)[:, None, :, None]
    step = tl.load(x + 72 * PLANES, mask=there, other=0).to(tl.float32, bitcast=True)[:, None, :, None]
    if KIND == PACKED:
        z = zeros_of(shift + b * shift_groups + shift_at + k * BITS, r, where, BITS)
        a0 = MAGIC_BITS - z * sum0
        a1 = MAGIC_BITS - z * sum1
        a2 = MAGIC_BITS - z * sum2
    else:
        a0 = tl.full(total.shape, MAGIC_BITS, tl.int32)
        a1 = a0
        a2 = a0
    for q in tl.static_range(8):
        f = quad(l0, l1, l2, l3, l4, l5, l6, l7, BITS, q)
        a0 = _dot4(f, tl.load(x + 8 * q, mask=there, other=0)[:, None, :, None], a0, ASM)
        if PLANES == 3:
            a1 = _dot4(f, tl.load(x + 64 + 8 * q, mask=there, other=0)[:, None, :, None], a1, ASM)
            a2 = _dot4(f, tl.load(x + 128 + 8 * q, mask=there, other=0)[:, None, :, None], a2, ASM)
    y = a0.to(tl.float32, bitcast=True) - MAGIC
    whole = sum0.to(tl.float32)
    if PLANES == 3:
        y += (a1.to(tl.float32, bitcast=True) - MAGIC) * (1 / FINER)
        y += (a2.to(tl.float32, bitcast=True) - MAGIC) * (1 / (FINER * FINER))
        whole += sum1.to(tl.float32) * (1 / FINER) + sum2.to(tl.float32) * (1 / (FINER * FINER))
    if KIND == OFFSET:
        o = tl.load(shift + (b * shift_groups + shift_at + k) * 16 + r, mask=where, other=0.0).to(tl.float32)
        total += (s * y + o * whole) * step
    elif KIND == PACKED:
        total += (s * step) * y
    else:
        total += (s * step) * (y - constant * whole)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _slice(  # type: ignore[no-untyped-def]
    total, codes, scale, zero, offset, planes, m, count, records, block, known,
    start, stop, at, first, scale_at, zero_at, offset_at, group_tiles, constant, lines, scale_groups, zero_words,
    offset_groups, M: tl.constexpr, T: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Tiles ``start`` to ``stop`` of one segment."""
    shift, shift_groups, shift_at = zero, zero_words, zero_at
    if KIND == OFFSET:
        shift, shift_groups, shift_at = offset, offset_groups, offset_at
    for begin in range(start, stop, T):
        tile = begin + tl.arange(0, T)
        here = tile < stop
        group = tile // group_tiles
        total = _chunk(
            total, codes, scale, shift, planes, m, count, records, block, known, at, first, tile, here,
            group, lines, scale_groups, shift_groups, scale_at, shift_at, constant, M, PLANES, BITS, KIND, ASM,
        )  # fmt: skip
    return total


# What would be compiled again for every shape otherwise.
_ANY = [
    "rows", "blocks", "lines", "scale_groups", "zero_words", "offset_groups", "tiles", "records", "count", "slices",
    "per", "group_tiles", "constant",
]  # fmt: skip


@triton.jit(do_not_specialize=_ANY)  # type: ignore[untyped-decorator]
def gemv_kernel(  # type: ignore[no-untyped-def]
    codes, scale, zero, offset, planes, table, bias, out, partial, counters, rows, blocks, lines, scale_groups,
    zero_words, offset_groups, tiles, records, count, slices, per, group_tiles, constant, M: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, PLANES: tl.constexpr, VARIANTS: tl.constexpr, SINGLE: tl.constexpr,
    SPLIT: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``out [count, rows]`` of ``R`` row blocks, one slice and ``M`` rows of ``x``.

    A matrix of one segment (``SINGLE`` is its variant) has slices of ``per`` tiles; else the table has a piece each.
    ``counters`` tell the last program of each row blocks' slices that it is the last; it leaves them at zero.
    """
    m = tl.program_id(2) * M + tl.arange(0, M)[:, None]
    block = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    known = block < blocks
    own = tl.program_id(1)
    total = tl.zeros([M, R, T, 16], tl.float32)
    if SINGLE >= 0:
        start = own * per
        stop = tl.minimum(start + per, tiles)
        total = _slice(
            total, codes, scale, zero, offset, planes, m, count, records, block, known,
            start, stop, 0, 0, 0, 0, 0, group_tiles, constant * 0.5, lines, scale_groups, zero_words, offset_groups,
            M, T, PLANES, SINGLE // 3, SINGLE % 3, ASM,
        )  # fmt: skip
    else:
        entry = table + own * FIELDS
        variant = tl.load(entry)
        start = tl.load(entry + 1)
        stop = tl.load(entry + 2)
        at = tl.load(entry + 4)
        first = tl.load(entry + 12)
        scale_at = tl.load(entry + 5)
        zero_at = tl.load(entry + 6)
        offset_at = tl.load(entry + 7)
        by = tl.load(entry + 8)
        half = tl.load(entry + 9).to(tl.float32) * 0.5
        for v in tl.static_range(3, 27):
            if (VARIANTS >> v) & 1:  # noqa: SIM102  # known when compiling, unlike the next
                if variant == v:
                    total = _slice(
                        total, codes, scale, zero, offset, planes, m, count, records, block, known,
                        start, stop, at, first, scale_at, zero_at, offset_at, by, half, lines, scale_groups,
                        zero_words, offset_groups, M, T, PLANES, v // 3, v % 3, ASM,
                    )  # fmt: skip
    y = tl.sum(total, 2)
    m = m[:, :, None]
    row = (block * 16)[None, :, None] + tl.arange(0, 16)[None, None, :]
    inside = (m < count) & (row < rows)
    if SPLIT:
        # Every slice leaves its sums; the program that finds all others done adds them up, in their order.
        place = partial + (own * count + m).to(tl.int64) * rows + row
        tl.store(place, y, mask=inside)
        tl.debug_barrier()
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        done = tl.atomic_add(counter, 1, sem="acq_rel")
        if done == slices - 1:
            tl.store(counter, 0)  # as the next launch wants it
            y = tl.zeros([M, R, 16], tl.float32)
            for other in range(slices):
                theirs = partial + (other * count + m).to(tl.int64) * rows + row
                y += tl.load(theirs, mask=inside, other=0.0, cache_modifier=".cg")
            if BIAS:
                y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
            tl.store(out + m.to(tl.int64) * rows + row, y.to(out.dtype.element_ty), mask=inside)
    else:
        if BIAS:
            y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
        tl.store(out + m.to(tl.int64) * rows + row, y.to(out.dtype.element_ty), mask=inside)

"""Rows of a packed matrix made dense, in stored order, and products with tiles that are made dense on the way.

Both go through weights in float32, rounded once to the type that is written or multiplied, as the definition does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitfloor.ops.triton.decode import FIELDS, OFFSET, weights_of


@triton.jit  # type: ignore[untyped-decorator]
def _piece(  # type: ignore[no-untyped-def]
    entry, codes, scale, zero, offset, channel_scale, block, r, known, tile, here, lines, scale_groups, zero_words,
    offset_groups, N: tl.constexpr, T: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Weights of tiles of the segment that an entry of the table describes; ``V`` is its variant."""
    if V % 3 == OFFSET:
        shift, shift_at, shift_groups = offset, tl.load(entry + 7), offset_groups
    else:
        shift, shift_at, shift_groups = zero, tl.load(entry + 6), zero_words
    return weights_of(
        codes, scale, shift, channel_scale, block, r, known, tile, here, tl.load(entry + 3), tl.load(entry + 4), lines,
        tl.load(entry + 5), scale_groups, shift_at, shift_groups, tl.load(entry + 8),
        tl.load(entry + 9).to(tl.float32) * 0.5, tl.load(entry + 11), N, T, V // 3, V % 3, ALIGNED, SCALED,
    )  # fmt: skip


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["first", "count", "rows", "tiles", "lines", "scale_groups", "zero_words", "offset_groups"]
)
def rows_kernel(  # type: ignore[no-untyped-def]
    codes, scale, zero, offset, channel_scale, table, ids, out, first, count, rows, tiles, lines, scale_groups,
    zero_words, offset_groups, N: tl.constexpr, T: tl.constexpr, VARIANTS: tl.constexpr, ALIGNED: tl.constexpr,
    SCALED: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """``out [count, 32 tiles]`` in stored order, padded with anything: rows from row block ``first`` on, or ``ids``.

    Of a row that is not there nothing is a number.
    """
    i = tl.program_id(0) * N + tl.arange(0, N)
    if IDS:
        row = tl.load(ids + i, mask=i < count, other=0)
        known = (i < count) & (row >= 0) & (row < rows)
        row = tl.where(known, row, 0)
        block = (row // 16).to(tl.int64)
        r = (row % 16).to(tl.int32)
    else:
        block = (first + i // 16).to(tl.int64)
        r = i % 16
        known = (i < count) & (block * 16 + r < rows)
    entry = table + tl.program_id(1) * FIELDS
    variant = tl.load(entry)
    stop = tl.load(entry + 2)
    tile = tl.load(entry + 1) + tl.arange(0, T)
    # Whole tiles only, so that 16 bytes are written at once.
    column = tl.arange(0, 32 * T)[None, :]
    inside = (i < count)[:, None] & (tl.load(entry + 1) + column // 32 < stop)
    begin = (i.to(tl.int64) * tiles + tl.load(entry + 12) + tl.load(entry + 1)) * 32
    for v in tl.static_range(3, 27):
        if (VARIANTS >> v) & 1:  # noqa: SIM102  # known when compiling, unlike the next
            if variant == v:
                w = _piece(
                    entry, codes, scale, zero, offset, channel_scale, block, r, known, tile, tile < stop, lines,
                    scale_groups, zero_words, offset_groups, N, T, v, ALIGNED, SCALED,
                )  # fmt: skip
                if IDS:
                    w = tl.where(known[:, None], w, float("nan"))
                tl.store(out + begin[:, None] + column, w.to(out.dtype.element_ty), mask=inside)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "count", "rows", "tiles", "entries", "split", "lines", "scale_groups", "zero_words", "offset_groups"
    ]
)  # fmt: skip
def gemm_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, offset, channel_scale, table, bias, out, count, rows, tiles, entries, split, lines,
    scale_groups, zero_words, offset_groups, M: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    VARIANTS: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x [count, 32 tiles]`` in stored order, zero in padding, times ``N`` rows of the matrix.

    Slice ``s`` of ``split`` has the pieces ``s, s + split, ...`` of the table and writes ``out[s]``, without a bias if
    there are several.
    """
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(1) * M + tl.arange(0, M)
    block = (n // 16).to(tl.int64)
    known = n < rows
    total = tl.zeros([M, N], tl.float32)
    for e in range(tl.program_id(2), entries, split):
        entry = table + e * FIELDS
        variant = tl.load(entry)
        start = tl.load(entry + 1)
        stop = tl.load(entry + 2)
        source = x + (m.to(tl.int64)[:, None] * tiles + tl.load(entry + 12)) * 32
        for v in tl.static_range(3, 27):
            if (VARIANTS >> v) & 1:  # noqa: SIM102  # known when compiling, unlike the next
                if variant == v:
                    for begin in range(start, stop, T):
                        tile = begin + tl.arange(0, T)
                        w = _piece(
                            entry, codes, scale, zero, offset, channel_scale, block, n % 16, known, tile, tile < stop,
                            lines, scale_groups, zero_words, offset_groups, N, T, v, ALIGNED, SCALED,
                        )  # fmt: skip
                        # Whole tiles only, so that 16 bytes are read at once.
                        i = tl.arange(0, 32 * T)[None, :]
                        given = (m < count)[:, None] & (begin + i // 32 < stop)
                        own = tl.load(source + (begin * 32 + i), mask=given, other=0.0)
                        total = tl.dot(own, tl.trans(w.to(own.dtype)), total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + n, mask=known, other=0.0).to(tl.float32)[None, :]
    place = out + (tl.program_id(2).to(tl.int64) * count + m[:, None]) * rows + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(m < count)[:, None] & known[None, :])

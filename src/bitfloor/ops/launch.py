"""How the work on a packed matrix is cut for a GPU: what each program gets, as plain numbers.

Nothing is tried out at run time. What is chosen follows from the shape, the widths, the rows of ``x`` and the number of
multiprocessors; nothing here needs Triton or a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bitfloor.core.bitpack import COLUMNS, row_blocks, tiles
from bitfloor.ops.form import OFFSET, PACKED, Form

FEW_ROWS = 8  # of x: codes are multiplied as they lie
SOME_ROWS = 256  # of x: tiles are made dense on the way into the product; above, panels of rows are
WIDE_ROWS = 32  # the same for float32, which tensor cores do not take
WARP_TILES = 8  # that a warp reads at once: 16 bytes a lane
WARPS = 4  # of a program that multiplies few rows
PROGRAMS = 4  # of those that a multiprocessor should have
MOST_SLICES = 32
MOST_PIECES = 1 << 30
UNIT = 4  # tiles that a program of the input side rounds
NONE = -(1 << 30)  # the place of something that is not there; still below 0 where a column is added


@dataclass(frozen=True)
class Piece:
    """Tiles of one segment that one program works through.

    Args:
        segment: index.
        start, stop: first tile of the segment and one past the last.
    """

    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class FewRows:
    """Launch of the product with few rows of ``x``.

    Args:
        rows: of ``x`` that a program multiplies, 1 or 2.
        blocks: row blocks of a program, a power of two.
        warps: of a program; it reads ``8 * warps`` tiles at once.
        pieces: one for every slice of the columns.
    """

    rows: int
    blocks: int
    warps: int
    pieces: tuple[Piece, ...]

    @property
    def step(self) -> int:
        """Tiles that a program reads at once."""
        return WARP_TILES * self.warps


@dataclass(frozen=True)
class SomeRows:
    """Launch of the product on tensor cores.

    Args:
        x_rows: rows of ``x`` of a program.
        rows: rows of the matrix of a program.
        step: tiles at once.
        warps: of a program.
        split: programs that share the columns.
        pieces: of all columns; program ``s`` has ``s, s + split, ...``.
    """

    x_rows: int
    rows: int
    step: int
    warps: int
    split: int
    pieces: tuple[Piece, ...]


def aligned(form: Form) -> bool:
    """Whether every group of a matrix ends with a tile, or with its segment."""
    return all(segment.groups == 1 or segment.group_size % COLUMNS == 0 for segment in form.segments)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()


@lru_cache(maxsize=4096)
def few_rows(form: Form, rows: int, processors: int) -> FewRows:
    """Cut the product with 1 to 8 rows of ``x``.

    More slices fill the processors better, and each costs every program the start that it has anyway, about a step:
    the number is taken that needs the fewest steps, one after the other. Slices are of about equal bytes, and the same
    for any number of rows, so that no sum depends on it.

    Args:
        form: of the matrix.
        rows: of ``x``.
        processors: multiprocessors of the GPU.
    """
    all_tiles = form.padded // COLUMNS
    warps = min(WARPS, max(1, power_of_two(all_tiles) // WARP_TILES))
    step, height = WARP_TILES * warps, row_blocks(form.shape[0])
    blocks = 2 if height >= processors else 1
    programs, room = -(-height // blocks), processors * PROGRAMS
    best: tuple[int, int, tuple[Piece, ...]] | None = None
    for slices in range(1, min(MOST_SLICES, -(-all_tiles // step)) + 1):
        found = pieces(form, slices, step)
        longest = max(-(-(piece.stop - piece.start) // step) for piece in found)
        cost = -(-programs * len(found) // room) * (longest + 1)
        if best is None or (cost, len(found)) < best[:2]:
            best = (cost, len(found), found)
    assert best is not None
    # More rows do not fit the registers, and would be summed in another order.
    return FewRows(min(rows, 2), blocks, warps, best[2])


@lru_cache(maxsize=4096)
def some_rows(form: Form, rows: int, processors: int, wide: bool) -> SomeRows:
    """Cut the product of more rows of ``x`` on tensor cores.

    Args:
        form: of the matrix.
        rows: of ``x``.
        processors: multiprocessors of the GPU.
        wide: whether ``x`` is float32, of which less fits.
    """
    # More does not fit the registers. Whole columns of tiles and four warps for 64 rows keep every load 16 bytes wide.
    x_rows = min(16 if wide else 64, max(16, power_of_two(rows)))
    tall = x_rows == 64 and form.shape[0] >= 128 * processors
    height, warps, step = 128 if tall else 64, 8 if tall else 4, 2
    programs = -(-form.shape[0] // height) * -(-rows // x_rows)
    steps = -(-form.padded // COLUMNS // step)
    split = max(1, min(MOST_SLICES // 2, 2 * processors // programs, steps // 8))
    return SomeRows(x_rows, height, step, warps, split, pieces(form, split, step))


def pieces(form: Form, slices: int, step: int) -> tuple[Piece, ...]:
    """Cut the segments into about so many pieces of equal bytes, at least one each, in steps of so many tiles."""
    total = sum(segment.code_bytes for segment in form.segments)
    found = []
    for index, segment in enumerate(form.segments):
        count = tiles(segment.columns)
        steps = -(-count // step)
        own = max(1, min(steps, round(slices * segment.code_bytes / total)))
        length = -(-steps // own) * step
        found += [Piece(index, start, min(count, start + length)) for start in range(0, count, length)]
    return tuple(found)


@lru_cache(maxsize=4096)
def table(form: Form, cut: tuple[Piece, ...]) -> tuple[tuple[int, ...], ...]:
    """What the kernels read of every piece, see ``FIELDS`` in :mod:`bitfloor.ops.triton.decode`.

    Returns:
        For each ``(variant, start, stop, columns, line, scale, zero-points, offset, group, constant, column, channel
        scale, tile)``. The variant is three times the width and the kind of zero. ``line`` to ``offset`` say where the
        segment begins in a row block: in lines of 16 dwords, in groups, in 16-bit words, in groups. A group is in tiles
        where groups end with tiles, else in columns. Then the constant in halves, the first stored column, the first
        channel scale or ``NONE``, and the first tile of the padded columns.
    """
    starts, even = [], aligned(form)
    line = scale = zero = offset = column = channel = tile = 0
    for s in form.segments:
        group = (s.group_size // COLUMNS if s.groups > 1 else max(1, tiles(s.columns))) if even else s.group_size
        starts.append(
            (s.columns, line, scale, zero, offset, group, s.constant, column, channel if s.scaled else NONE, tile)
        )
        line += s.code_bytes // 64
        scale += s.groups
        zero += s.bits * s.groups if s.zero == PACKED else 0
        offset += s.groups if s.zero == OFFSET else 0
        channel += s.columns if s.scaled else 0
        column += s.columns
        tile += tiles(s.columns)
    return tuple((variant(form, p.segment), p.start, p.stop, *starts[p.segment]) for p in cut)


def variant(form: Form, segment: int) -> int:
    """Width and kind of zero of a segment as one number, at most 26."""
    return 3 * form.segments[segment].bits + form.segments[segment].zero


@lru_cache(maxsize=4096)
def variants(form: Form) -> int:
    """Which variants occur, as bits."""
    found = 0
    for index in range(len(form.segments)):
        found |= 1 << variant(form, index)
    return found


def units(form: Form, int8: bool) -> list[list[int]]:
    """What the input side reads of every four tiles: ``[tile, column, columns, channel scale, tiles of a step]``: the
    first tile of the padded columns, the first stored column, the columns left in the segment, at most 128, the first
    channel scale or ``NONE``, and how many tiles share a step."""
    found = []
    tile = column = channel = 0
    for s in form.segments:
        share = max(1, s.activation_block // COLUMNS) if int8 else 1
        for start in range(0, tiles(s.columns), UNIT):
            at = start * COLUMNS
            left = min(UNIT * COLUMNS, s.columns - at)
            found.append([tile + start, column + at, left, channel + at if s.scaled else NONE, share])
        channel += s.columns if s.scaled else 0
        column += s.columns
        tile += tiles(s.columns)
    return found


def turns(columns: int, size: int) -> list[list[int]]:
    """First column and size of every block of a rotation (docs/format.md)."""
    found, at = [], 0
    while size:
        while columns - at >= size:
            found.append([at, size])
            at += size
        size //= 2
    return found

"""How the work on a packed matrix is cut for a GPU."""

from __future__ import annotations

import pytest
import torch
from packed_cases import matrix, stored

from bitfloor.core.rotation import rotate
from bitfloor.ops import launch
from bitfloor.ops.form import Form, read_form

SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096), (576, 576), (192, 576), (1, 1), (128256, 4096))
H100 = 132  # multiprocessors


def form(rows: int, columns: int, bits: int = 4, group_size: int = 64) -> Form:
    return read_form((rows, columns, 0, 0, 0, 0, 0, columns, bits, group_size, 0, 0, 0))


def mixed(rows: int = 4096) -> Form:
    segments = ((819, 4, 819, 0, 0, 0), (3277, 1, 3277, 1, 0, 1), (1000, 3, 128, 2, 7, 0))
    numbers = [rows, 5096, 0, 0, 0, 0, 0]
    return read_form((*numbers, *(number for segment in segments for number in segment)))


def covered(cut: tuple[launch.Piece, ...], known: Form) -> bool:
    """Whether the pieces are all tiles of all segments, once and in order."""
    tiles = [(piece.segment, tile) for piece in cut for tile in range(piece.start, piece.stop)]
    return tiles == [(at, tile) for at, s in enumerate(known.segments) for tile in range(-(-s.columns // 32))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_every_tile_is_in_one_piece(shape: tuple[int, int], bits: int) -> None:
    known = form(*shape, bits)
    for rows in range(1, 9):
        few = launch.few_rows(known, rows, H100)
        assert covered(few.pieces, known)
        assert few.rows == min(rows, 2)
        assert len(few.pieces) <= launch.MOST_SLICES
        one = launch.few_rows(known, 1, H100)
        assert (few.pieces, few.warps) == (one.pieces, one.warps)  # a row's sums must not depend on other rows
    for rows in (9, 16, 100, 256):
        some = launch.some_rows(known, rows, H100, wide=rows == 100)
        assert covered(some.pieces, known)
        assert some.x_rows >= 16 and some.rows >= 16 and some.step >= 1  # what tensor cores take
        assert 1 <= some.split <= launch.MOST_SLICES


def test_mixed_segments_are_cut_by_bytes() -> None:
    known = mixed()
    cut = launch.pieces(known, 12, 8)
    assert covered(cut, known)
    sizes = [(piece.stop - piece.start) * known.segments[piece.segment].bits for piece in cut]
    assert max(sizes) < 2.5 * sum(sizes) / len(sizes)


def test_a_large_matrix_fills_the_processors() -> None:
    for shape in SHAPES[:3]:
        cut = launch.few_rows(form(*shape), 1, H100)
        programs = -(-shape[0] // 16 // cut.blocks) * len(cut.pieces)
        assert programs >= 2 * H100


def test_the_table_says_where_segments_begin() -> None:
    known = mixed()
    rows = launch.table(known, launch.pieces(known, 1, 1024))
    assert [row[0] for row in rows] == [12, 4, 11]
    assert [list(row[3:]) for row in rows] == [
        [819, 0, 0, 0, 0, 26, 0, 0, launch.NONE, 0],
        [3277, 104, 1, 4, 0, 103, 0, 819, 0, 26],
        [1000, 207, 2, 4, 1, 4, 7, 4096, launch.NONE, 129],
    ]
    assert launch.variants(known) == 1 << 12 | 1 << 4 | 1 << 11


def test_units_cover_the_stored_columns() -> None:
    known = mixed()
    for int8 in (False, True):
        units = launch.units(known, int8)
        assert sum(unit[2] for unit in units) == 5096
        assert all(0 < unit[2] <= 128 for unit in units)
        assert list(dict.fromkeys(unit[4] for unit in units)) == ([1, 4, 2] if int8 else [1])
    assert [unit[3] for unit in launch.units(known, False)][7:9] == [0, 128]


@pytest.mark.parametrize(
    ("bits", "group_size", "block"),
    [(1, 128, 128), (1, 64, 64), (1, 400, 128), (2, 128, 64), (3, 64, 64), (3, 96, 32), (3, 400, 64), (4, 128, 32)]
    + [(4, 400, 32), (5, 32, 32), (8, 64, 32), (8, 48, 0), (2, 16, 0)],
)
def test_wide_codes_have_small_blocks_of_activations(bits: int, group_size: int, block: int) -> None:
    assert form(16, 400, bits, group_size).segments[0].activation_block == block


def test_groups_and_tiles() -> None:
    assert launch.aligned(form(16, 100, group_size=32)) and launch.aligned(form(16, 100, group_size=100))
    assert not launch.aligned(form(16, 100, group_size=48))
    assert launch.aligned(read_form(tuple(stored(matrix(4, [(40, 2)], group_size=0))[1])))


@pytest.mark.parametrize("columns", [1, 43, 64, 160])
@pytest.mark.parametrize("size", [2, 16, 64])
def test_turns_are_the_blocks_of_the_rotation(columns: int, size: int) -> None:
    turned = rotate(torch.eye(columns), size)
    blocks = launch.turns(columns, size)
    assert [start for start, _ in blocks] == [sum(width for _, width in blocks[:at]) for at in range(len(blocks))]
    assert sum(width for _, width in blocks) == columns
    for start, width in blocks:
        own = turned[start : start + width]
        assert own[:, start : start + width].all() and int(own.count_nonzero()) == width * width

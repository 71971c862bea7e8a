"""Packing loses nothing, at any shape and width, and rows of a tile can be told apart."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfloor.core.bitpack import (
    blocked,
    pack_tiles,
    pack_zeros,
    row_blocks,
    tiles,
    unblocked,
    unpack_tiles,
    unpack_zeros,
)
from bitfloor.core.spec import BITS

LAW = settings(max_examples=60, deadline=None, derandomize=True)
WIDTHS = st.sampled_from(BITS)
ROWS, COLUMNS, SEEDS = st.integers(1, 50), st.integers(1, 100), st.integers(0, 2**16)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    """Codes that visit the ends of their range often: neighbours of 0 and 2^b - 1 show a borrow or a carry."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    ends = torch.randint(0, 3, (rows, columns), generator=generator)
    return codes.where(ends != 1, torch.tensor(0, dtype=torch.uint8)).where(
        ends != 2, torch.tensor((1 << bits) - 1, dtype=torch.uint8)
    )


@LAW
@given(WIDTHS, ROWS, COLUMNS, SEEDS)
def test_tiles_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_tiles(codes, bits)
    assert packed.shape == (row_blocks(rows), tiles(columns), 64 * bits)
    assert torch.equal(unpack_tiles(packed, bits, rows, columns), codes)


@LAW
@given(WIDTHS, st.integers(1, 3), st.integers(1, 4), SEEDS)
def test_any_bytes_are_codes_and_come_back(bits: int, blocks: int, count: int, seed: int) -> None:
    # The other direction: no byte pattern is unused, so the layout cannot be any denser.
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (blocks, count, 64 * bits), generator=generator, dtype=torch.uint8)
    assert torch.equal(pack_tiles(unpack_tiles(packed, bits, 16 * blocks, 32 * count), bits), packed)


@LAW
@given(WIDTHS, st.integers(1, 4), ROWS, COLUMNS, SEEDS)
def test_columns_packed_tile_by_tile_equal_columns_packed_at_once(
    bits: int, split: int, rows: int, columns: int, seed: int
) -> None:
    codes = random_codes(rows, columns, bits, seed)
    parts = [pack_tiles(part, bits) for part in torch.split(codes, 32 * split, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), pack_tiles(codes, bits))


@LAW
@given(WIDTHS, ROWS, st.integers(1, 9), SEEDS)
def test_zero_points_round_trip(bits: int, rows: int, groups: int, seed: int) -> None:
    zero = random_codes(rows, groups, bits, seed)
    packed = pack_zeros(zero, bits)
    assert packed.shape == (row_blocks(rows), groups * 2 * bits)
    assert torch.equal(unpack_zeros(packed, bits, rows, groups), zero)


@LAW
@given(ROWS, st.integers(1, 9), st.sampled_from([torch.float16, torch.bfloat16]), SEEDS)
def test_blocked_values_round_trip(rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    values = torch.randn(rows, groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert torch.equal(unblocked(blocked(values), rows), values)

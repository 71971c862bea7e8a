"""Grids, rounding onto them, and what storage does to their numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitfloor.core.affine import SMALLEST_SCALE, Grid, decode, encode, pack, stored, stored_scale
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.solvers.ranges import minmax_grid

DTYPES = [torch.float16, torch.bfloat16]


def hand_grid() -> Grid:
    """Two rows, two groups of two columns (the second short), two bits; the second row has negative scales."""
    scale = torch.tensor([[0.5, 1.0], [-0.5, -1.0]])
    zero = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    return Grid(scale, zero, None, torch.tensor([2, 2]), 2)


def test_codes_by_hand() -> None:
    weight = torch.tensor([[-0.5, 0.8, 2.2], [-0.5, 0.9, 1.7]])
    codes = encode(weight, hand_grid())
    # Row 0: -1 + 1, round(1.6) + 1, round(2.2).   Row 1: 1 + 2, round(-1.8) + 2, round(-1.7) + 3.
    assert codes.tolist() == [[0, 3, 2], [3, 0, 1]]
    assert decode(codes, hand_grid()).tolist() == [[-0.5, 1.0, 2.0], [-0.5, 1.0, 2.0]]


def test_codes_stay_in_range_however_far_the_weight() -> None:
    weight = torch.tensor([[1e30, -1e30, 1e30], [1e30, -1e30, 1e30]])
    assert encode(weight, hand_grid()).tolist() == [[3, 0, 3], [0, 3, 0]]


def test_shift_and_largest_codes() -> None:
    grid = hand_grid()
    assert grid.shift.tolist() == [[-0.5, 0.0], [1.0, 3.0]]
    offset = torch.tensor([[0.25, 0.5], [0.0, 1.0]])
    assert torch.equal(replace(grid, zero=None, offset=offset).shift, offset)
    assert replace(grid, bits=torch.tensor(BITS)).max_code.tolist() == [1, 3, 7, 15, 31, 63, 255]


def test_columns_spread_groups_and_cut_the_last() -> None:
    scale, shift, top = replace(hand_grid(), bits=torch.tensor([2, 4])).columns(3)
    assert scale.tolist() == [[0.5, 0.5, 1.0], [-0.5, -0.5, -1.0]]
    assert shift.tolist() == [[-0.5, -0.5, 0.0], [1.0, 1.0, 3.0]]
    assert top.tolist() == [3, 3, 15]


def test_widths_may_differ_from_group_to_group() -> None:
    grid = Grid(torch.ones(1, 3), torch.zeros(1, 3), None, torch.tensor([1, 2, 8]), 2)
    assert encode(torch.full((1, 6), 1e3), grid).tolist() == [[1, 1, 3, 3, 255, 255]]
    assert encode(torch.full((1, 6), 200.0), grid)[0, -1] == 200


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_scale_is_representable_finite_and_not_zero_with_its_sign(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1e-45, 1e-30, 1e-8, 0.1, 1.0, 1e5, 3e38])
    for sign in (1.0, -1.0):
        kept = stored_scale(sign * values, dtype)
        assert torch.equal(kept.to(dtype).float(), kept)
        assert bool(torch.isfinite(kept).all())
        assert bool((kept[1:] * sign > 0).all())
        assert float(kept.abs().min()) == SMALLEST_SCALE[dtype]
    assert stored_scale(torch.zeros(1), dtype).item() == SMALLEST_SCALE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_scale_is_what_the_type_can_hold(dtype: torch.dtype) -> None:
    smallest = torch.tensor(SMALLEST_SCALE[dtype])
    assert smallest.to(dtype).float() == smallest
    below = torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 2.0**-24
    assert float(smallest) == below


def test_stored_values_saturate_instead_of_overflowing() -> None:
    values = torch.tensor([1e30, -1e30, 65519.0, 1 / 3])
    assert stored(values, torch.float16).tolist() == [65504.0, -65504.0, 65504.0, 0.333251953125]
    assert stored(values, torch.bfloat16)[3] == 0.333984375


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_what_is_packed_dequantizes_to_what_was_decoded(bits: int, symmetric: bool, scale_dtype: str) -> None:
    weight = torch.randn(21, 50, generator=torch.Generator().manual_seed(bits))
    grid = minmax_grid(weight, QuantSpec(bits, 16, symmetric, scale_dtype))
    codes = encode(weight, grid)
    packed = pack(codes, grid)
    assert packed.shape == (21, 50)
    assert packed.segments[0].scale.dtype == getattr(torch, scale_dtype)
    assert torch.equal(dequantize(packed), decode(codes, grid))


def test_a_constant_zero_point_is_not_stored() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    grid = minmax_grid(weight, QuantSpec(3, -1, symmetric=True))
    assert pack(encode(weight, grid), grid).segments[0].zero == 4
    one_bit = minmax_grid(weight, QuantSpec(1, -1, symmetric=True))
    segment = pack(encode(weight, one_bit), one_bit).segments[0]
    assert segment.zero is None
    assert segment.offset is not None


def test_widths_are_sorted_into_segments_and_the_order_says_where_groups_went() -> None:
    bits = torch.tensor([3, 1, 2, 1, 3])
    zero, offset = torch.ones(2, 5), -0.5 * torch.ones(2, 5)
    grid = Grid(torch.ones(2, 5), zero, offset, bits, 2)
    codes = torch.arange(9, dtype=torch.uint8).repeat(2, 1) % 2  # the last group has one column
    packed = pack(codes, grid)
    found = [(s.start, s.stop, s.bits, s.group_size) for s in packed.segments]
    assert found == [(0, 4, 1, 2), (4, 6, 2, 2), (6, 9, 3, 2)]
    assert packed.order is not None and packed.order.tolist() == [1, 3, 2, 0, 4] and packed.order_unit == 2
    assert [s.offset is not None for s in packed.segments] == [True, False, False]
    assert torch.equal(dequantize(packed), decode(codes, grid))
    sorted_already = pack(codes, replace(grid, bits=bits.sort().values))
    assert sorted_already.order is None and sorted_already.order_unit == 1

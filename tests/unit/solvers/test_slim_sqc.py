"""The published search of ranges, value by value."""

from __future__ import annotations

import pytest
import torch

from bitfloor.core.affine import decode, encode
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.ranges import minmax_grid, search_grid
from bitfloor.solvers.slim_sqc import EXPONENT, FACTORS, sqc_grid


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(7, 44, generator=generator)


def test_there_are_101_factors_within_ten_percent_and_one_comes_first() -> None:
    assert len(FACTORS) == len(set(FACTORS)) == 101 and FACTORS[0] == 1.0
    assert max(FACTORS) == pytest.approx(1.1) and min(FACTORS) == pytest.approx(0.9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_row_takes_the_factor_with_the_smallest_error(bits: int) -> None:
    weight, spec = weights(), QuantSpec(bits, 16)
    start, found = minmax_grid(weight, spec), sqc_grid(weight, spec)
    assert start.zero is not None and found.zero is not None and torch.equal(found.zero, start.zero)
    for row in range(7):
        for group in range(3):
            part = weight[row, 16 * group : 16 * group + 16]
            zero = start.zero[row, group]

            def error(scale: torch.Tensor, part: torch.Tensor = part, zero: torch.Tensor = zero) -> float:
                codes = ((part / scale).round() + zero).clamp(0, 2**bits - 1)
                return float(((codes - zero) * scale - part).abs().pow(EXPONENT).sum())

            trials = [(start.scale[row, group] * factor).half().float() for factor in FACTORS]
            best = min(error(trial) for trial in trials)
            assert error(found.scale[row, group]) == pytest.approx(best, rel=1e-5)


def test_at_two_bits_it_ends_at_its_edge_and_loses_to_the_wide_search() -> None:
    weight, spec = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), QuantSpec(2, 128)
    start, narrow = minmax_grid(weight, spec), sqc_grid(weight, spec)
    assert float((narrow.scale / start.scale <= 0.905).float().mean()) > 0.95
    errors = [
        float((decode(encode(weight, grid), grid) - weight).square().mean())
        for grid in (start, narrow, search_grid(weight, torch.ones(128), spec))
    ]
    assert errors[0] > errors[1] > 1.2 * errors[2]


def test_one_bit_groups_keep_their_mean() -> None:
    weight = weights() + 3.0
    grid = sqc_grid(weight, QuantSpec(2, 16, widths=(1, 2, 3)))
    one = minmax_grid(weight[:, :16], QuantSpec(1, 16))
    assert torch.equal(grid.scale[:, :1], one.scale) and torch.equal(grid.shift[:, :1], one.shift)
    assert sqc_grid(weight, QuantSpec(1, 16)).zero is None
    with pytest.raises(ValueError, match="asymmetric"):
        sqc_grid(weight, QuantSpec(2, 16, symmetric=True))

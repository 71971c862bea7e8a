"""Grids of weights and importances nobody wants to meet: all zero, tiny, huge, forty decades apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import decode, encode
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.solvers.ranges import minmax_grid, search_grid

KINDS = [(bits, symmetric, dtype) for bits in BITS for symmetric in (False, True) for dtype in ("float16", "bfloat16")]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), KINDS)
@pytest.mark.parametrize("search", [False, True])
def test_an_all_zero_row_stays_zero(bits: int, symmetric: bool, dtype: str, search: bool) -> None:
    weight = normal(3, 10)
    weight[1] = 0
    importance = normal(1, 10, seed=1)[0].square() if search else None
    grid = search_grid(weight, importance, QuantSpec(bits, 4, symmetric, dtype))
    assert bool((grid.scale != 0).all())
    assert decode(encode(weight, grid), grid)[1].abs().max() == 0


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), KINDS)
def test_importances_over_forty_decades_give_finite_grids(bits: int, symmetric: bool, dtype: str) -> None:
    exponent = torch.linspace(-20, 20, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    importance = torch.pow(10.0, exponent)
    weight = normal(5, 48)
    grid = search_grid(weight, importance, QuantSpec(bits, 16, symmetric, dtype))
    assert bool(torch.isfinite(grid.scale).all())
    assert bool(torch.isfinite(grid.shift).all())
    columns = slice(int(importance.argmax()) // 16 * 16, int(importance.argmax()) // 16 * 16 + 16)
    start = minmax_grid(weight, QuantSpec(bits, 16, symmetric, dtype))
    before, after = (
        ((decode(encode(weight, one), one) - weight)[:, columns].square().double() * importance[columns]).sum(-1)
        for one in (start, grid)
    )
    assert bool((after <= before * (1 + 1e-5)).all())  # float32 sums inside the search


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e5, 1e6, 1e30])
def test_tiny_and_huge_weights_give_sane_codes(bits: int, symmetric: bool, dtype: str, size: float) -> None:
    weight = size * normal(4, 32)
    for importance in (None, torch.ones(32)):
        grid = search_grid(weight, importance, QuantSpec(bits, 16, symmetric, dtype))
        back = decode(encode(weight, grid), grid)
        assert bool((grid.scale != 0).all())
        assert bool(torch.isfinite(back).all())
        # Saturation and underflow lose the weight at worst, and never do more harm than zeros would.
        assert float((back - weight).norm()) <= float(weight.norm()) * (1 + 1e-6)


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_bfloat16_scales_hold_what_float16_cannot(size: float) -> None:
    weight = size * normal(4, 64)

    def error(dtype: str) -> float:
        grid = minmax_grid(weight, QuantSpec(4, 16, scale_dtype=dtype))
        return float((decode(encode(weight, grid), grid) / size - weight / size).square().mean())

    # Four bits of a normal group of 16 leave about half a percent of the energy; float16 leaves a third or all of it.
    assert error("bfloat16") < 0.01
    assert error("float16") > 0.3

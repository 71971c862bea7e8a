"""Coordinate descent only ever lowers the output error, and stops where no single change helps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.descent import descend
from bitfloor.solvers.ranges import minmax_grid

DAMPING = 0.01


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator)  # correlated channels
    return weight, x.T @ x


def damped(hessian: Tensor) -> Tensor:
    live = hessian.diagonal()[hessian.diagonal() > 0]
    return hessian.double() + DAMPING * float(live.mean()) * torch.eye(len(hessian))


def errors(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Of every row ``[O]``."""
    difference = (decode(codes, grid) - weight).double()
    return ((difference @ damped(hessian)) * difference).sum(1)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, True), (2, True), (1, False)])
@pytest.mark.parametrize("columns", [8, 21])
def test_no_sweep_raises_the_error_of_any_row(bits: int, symmetric: bool, columns: int) -> None:
    weight, hessian = problem(12, columns)
    grid = minmax_grid(weight, QuantSpec(bits, 8, symmetric))
    codes = encode(weight, grid)
    last = start = errors(weight, codes, grid, hessian)
    for sweeps in (1, 2, 5):
        found, moved = descend(weight, codes, grid, hessian, damping=DAMPING, sweeps=sweeps)
        now = errors(weight, found, moved, hessian)
        # Beyond the rounding of float32 sums.
        assert bool((now <= last * (1 + 1e-4)).all())
        assert int(found.max()) < 1 << bits
        last = now
    assert float(last.sum()) < 0.8 * float(start.sum())
    assert torch.equal(moved.scale, moved.scale.half().float())


def test_in_the_end_no_single_code_can_change_for_the_better() -> None:
    weight, hessian = problem(5, 10)
    grid = minmax_grid(weight, QuantSpec(2, 5))
    codes, grid = descend(weight, encode(weight, grid), grid, hessian, damping=DAMPING, sweeps=100)
    best = errors(weight, codes, grid, hessian)
    for column, code in itertools.product(range(10), range(4)):
        other = codes.clone()
        other[:, column] = code
        assert bool((errors(weight, other, grid, hessian) >= best * (1 - 1e-4)).all())


def test_uncorrelated_channels_are_rounded_to_nearest() -> None:
    weight, _ = problem(6, 16)
    grid = minmax_grid(weight, QuantSpec(4, 8))
    start = torch.zeros(6, 16, dtype=torch.uint8)
    found, moved = descend(weight, start, grid, torch.eye(16), damping=0.0, sweeps=1)
    # The scale follows its group's codes, so only the first group met the scale of the start.
    assert torch.equal(found[:, :8], encode(weight, grid)[:, :8])
    assert float((decode(found, moved) - weight).square().sum()) <= float(
        (decode(encode(weight, grid), grid) - weight).square().sum()
    )


def test_dead_columns_stay_and_no_input_is_changed() -> None:
    weight, hessian = problem(4, 12)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    grid = minmax_grid(weight, QuantSpec(3, 6))
    codes = encode(weight, grid)
    before = [tensor.clone() for tensor in (weight, codes, hessian, grid.scale)]
    found, _ = descend(weight, codes, grid, hessian, damping=DAMPING, sweeps=3)
    assert torch.equal(found[:, 3], codes[:, 3])
    assert all(torch.equal(a, b) for a, b in zip((weight, codes, hessian, grid.scale), before, strict=True))
    nothing, _ = descend(weight, codes, grid, torch.zeros(12, 12), damping=DAMPING, sweeps=3)
    assert torch.equal(nothing, codes)

"""SBA: the published sweep, computed the long way, and its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import decode, encode
from bitfloor.core.linalg import inverse_factor
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.salience import group_salience, removal_costs
from bitfloor.solvers.slim_bits import Sweep, candidates, divergence, widths_of


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and inputs with channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator), x


def rounded(weight: Tensor, widths: tuple[int, ...], size: int) -> Tensor:
    grid = minmax_grid(weight, QuantSpec(2, size, widths=widths))
    return decode(encode(weight, grid), grid)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("uniform", [False, True])
def test_which_numbers_are_tried(groups: int, uniform: bool) -> None:
    tried = candidates(groups, uniform)
    published = list(range(1, groups // 2))  # floor(G / 2) itself is not
    assert list(tried) == ([0] if uniform or not published else []) + published


@pytest.mark.parametrize("columns", [40, 44, 8, 5])  # five groups, a short last one, one group, one short group
@pytest.mark.parametrize("bits", [2, 3])
def test_the_incremental_sweep_is_the_full_one(columns: int, bits: int) -> None:
    weight, x = layer(24, columns)
    salience = group_salience(weight, removal_costs(x.T @ x), 8)
    tried = candidates(len(salience), True)

    def whole(step: int) -> Tensor:
        return rounded(weight, (bits + step,) * len(salience), 8)

    sweep = Sweep(weight, whole, salience, 8, tried)
    for part in x.split(64):
        sweep.add(part)
    full = {p: divergence(x @ rounded(weight, widths_of(salience, bits, p), 8).T, x @ weight.T) for p in tried}
    assert sweep.tokens == len(x) and sweep.loss.keys() == full.keys()
    for p in tried:
        assert sweep.loss[p] == pytest.approx(full[p], rel=1e-4)
    assert sweep.best() == min(full, key=full.__getitem__)


def test_the_divergence_is_that_of_the_rounded_from_the_exact() -> None:
    exact, other = torch.randn(50, 9), torch.randn(50, 9)
    expected = torch.nn.functional.kl_div(
        exact.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert divergence(other, exact) == pytest.approx(float(expected), rel=1e-5)
    assert abs(divergence(exact, exact)) < 1e-5


@pytest.mark.parametrize("p", [0, 1, 3])
def test_widths_keep_their_mean_and_follow_salience(p: int) -> None:
    salience = torch.tensor([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0])
    widths = widths_of(salience, 3, p)
    assert sum(widths) == 3 * 7 and widths.count(4) == widths.count(2) == p
    if p:
        assert min(s for s, w in zip(salience.tolist(), widths, strict=True) if w == 4) > max(
            s for s, w in zip(salience.tolist(), widths, strict=True) if w == 2
        )


def test_removal_costs_are_what_removing_costs() -> None:
    """Against least squares: with the columns before it fixed, column ``j`` is set to zero, those behind adapt."""
    _, x = layer(1, 12)
    hessian = (x.T @ x).double()
    factor, _ = inverse_factor(hessian, 0.01)
    damped = (factor.T @ factor).inverse()
    published, free = removal_costs(hessian), removal_costs(hessian, positional=False)
    for j in range(12):
        behind = list(range(j + 1, 12))
        others = [k for k in range(12) if k != j]
        for costs, rest in ((published, behind), (free, others)):
            inner, cross = damped[rest][:, rest], damped[rest, j]
            gain = cross @ torch.linalg.solve(inner, cross) if rest else 0.0
            assert float(costs[j]) == pytest.approx(float(damped[j, j] - gain), rel=1e-4)
    assert bool((published >= free * (1 - 1e-5)).all())


def test_dead_channels_cost_nothing_and_a_deficient_hessian_is_damped() -> None:
    _, x = layer(1, 12)
    x[:, 3] = 0
    few = x[:4]  # rank four
    costs = removal_costs(few.T @ few)
    assert float(costs[3]) == 0 and bool((costs[[0, 1, 2, 4]] > 0).all()) and bool(costs.isfinite().all())

"""The budget's choice against all choices there are, and against its own bound."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.solvers.budget import allot


def problem(groups: int, widths: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distortions that fall about fourfold a bit, groups of unlike weight and size."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.arange(1, widths + 1, dtype=torch.float64)
    size = torch.randint(1, 4, (groups, 1), generator=generator) * 64.0
    scale = torch.randn(groups, 1, generator=generator, dtype=torch.float64).mul(2).exp()
    noise = torch.rand(groups, widths, generator=generator, dtype=torch.float64) * 0.2 + 0.9
    return scale * 4.0**-bits * noise, size * bits + 16.0


def best_of_all(distortion: Tensor, cost: Tensor, budget: float) -> float:
    groups, widths = distortion.shape
    at = range(groups)
    found = [
        sum(float(distortion[k, c[k]]) for k in at)
        for c in itertools.product(range(widths), repeat=groups)
        if sum(float(cost[k, c[k]]) for k in at) <= budget
    ]
    return min(found)


@pytest.mark.parametrize("seed", range(8))
def test_the_bound_holds_and_the_choice_is_within_its_gap_of_the_best(seed: int) -> None:
    distortion, cost = problem(6, seed=seed)
    for share in (0.3, 0.5, 0.8):
        budget = float(cost[:, 0].sum() + share * (cost[:, -1] - cost[:, 0]).sum())
        found = allot(distortion, cost, budget)
        best = best_of_all(distortion, cost, budget)
        at = torch.arange(6)
        assert found.cost == float(cost[at, found.choice].sum()) <= budget
        assert found.distortion == pytest.approx(float(distortion[at, found.choice].sum()), rel=1e-12)
        assert found.bound <= best * (1 + 1e-9) and best <= found.distortion * (1 + 1e-9)
        assert found.distortion * (1 - found.gap) <= best * (1 + 1e-9)


def test_with_many_groups_nothing_is_left_to_gain() -> None:
    distortion, cost = problem(3000)
    found = allot(distortion, cost, 0.5 * float(cost[:, 1].sum() + cost[:, 2].sum()))
    assert found.gap < 1e-4
    uniform = float(distortion[:, 1].sum())
    mixed = allot(distortion, cost, float(cost[:, 1].sum()))
    assert mixed.cost <= float(cost[:, 1].sum()) and mixed.distortion < 0.5 * uniform


def test_a_budget_for_everything_takes_the_best_of_everything() -> None:
    distortion, cost = problem(20)
    found = allot(distortion, cost, 1e9)
    assert bool((found.choice == distortion.argmin(1)).all()) and found.gap == 0
    least = float(cost[:, 0].sum())
    assert bool((allot(distortion, cost, least).choice == 0).all())


def test_what_cannot_be_is_said() -> None:
    distortion, cost = problem(5)
    with pytest.raises(InputError, match="cannot be met: the narrowest widths take"):
        allot(distortion, cost, float(cost[:, 0].sum()) - 1)
    distortion[2, 1] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        allot(distortion, cost, 1e9)


def test_more_bits_may_be_worse_and_are_then_not_bought() -> None:
    distortion = torch.tensor([[1.0, 2.0, 0.5], [1.0, 0.9, 0.95]])
    cost = torch.tensor([[1.0, 2.0, 3.0]]).expand(2, 3)
    assert allot(distortion, cost, 6.0).choice.tolist() == [2, 1]

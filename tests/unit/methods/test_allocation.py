"""Widths by GPTQ's own errors: what is said of a candidate is what GPTQ with its widths leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitfloor.core.affine import decode
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.methods.allocation import SbaConfig, Widths, _by_errors
from bitfloor.methods.gptq import Shown, solve
from bitfloor.methods.options import GptqConfig
from bitfloor.pipeline.budget import item_of
from bitfloor.pipeline.job import Allocation
from bitfloor.pipeline.survey import Stakes
from bitfloor.solvers.slim_bits import widths_of

COLUMNS, GROUP = 96, 8
TUNED = SbaConfig(uniform=True, ranges="gptq", positional=False)


def layer(salient: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the Hessian of correlated inputs, of which a few groups are louder than the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 24, generator=generator) @ torch.randn(24, COLUMNS, generator=generator)
    x += torch.randn(2048, COLUMNS, generator=generator)
    x[:, 3 * GROUP : 5 * GROUP] *= salient
    return torch.randn(48, COLUMNS, generator=generator), x.T @ x


def found(salient: float, config: SbaConfig = TUNED) -> Widths:
    weight, hessian = layer(salient)
    return _by_errors(weight, hessian, QuantSpec(2, GROUP), config, b"")


def left(weight: torch.Tensor, hessian: torch.Tensor, widths: tuple[int, ...]) -> float:
    """The relative error of the output that GPTQ with these widths leaves, by the damped Hessian as it sees it."""
    how = GptqConfig(importance=TUNED.importance, damping=TUNED.damping, static_groups=False)
    solved, _ = solve(weight, Shown(hessian, None, 2048), QuantSpec(2, GROUP, widths=widths), how)
    off = decode(solved.codes, solved.grid) - weight
    damped = hessian + TUNED.damping * hessian.diagonal().mean() * torch.eye(COLUMNS)
    return float(((off @ damped) * off).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("salient", [1.0, 6.0])
def test_what_is_said_of_every_candidate_is_what_gptq_leaves(salient: float) -> None:
    weight, hessian = layer(salient)
    why = found(salient).why
    salience = torch.tensor(why["salience"])
    assert len(why["error"]) > 2
    for p, foretold in why["error"].items():
        actual = left(weight, hessian, widths_of(salience, 2, int(p)))
        assert foretold == pytest.approx(actual, rel=0.01), p


def test_where_nothing_is_salient_nothing_is_promoted_and_where_something_is_it_is() -> None:
    calm, loud = found(1.0), found(8.0)
    assert calm.why["promoted"] == 0 and set(calm.widths) == {2}
    # It stops where nothing has been gained for a while.
    assert list(calm.why["error"]) == ["0", "1", "2"]
    assert {k for k, width in enumerate(loud.widths) if width == 3} == {3, 4}
    weight, hessian = layer(8.0)
    assert left(weight, hessian, loud.widths) < 0.8 * left(weight, hessian, (2,) * len(loud.widths))


def test_every_plan_of_a_budget_loses_what_gptq_leaves_with_it() -> None:
    """Not the sum of what its groups lose while all have one width, which is off by a fifth here."""
    weight, hessian = layer(8.0)
    ref, spec = MatrixRef("a", "a", (48, COLUMNS), 0, "linear"), QuantSpec(2, GROUP)
    how = GptqConfig(importance=TUNED.importance, damping=TUNED.damping, static_groups=False)
    item = item_of(ref, spec, weight, Stakes(torch.ones(48), hessian, 2048), Allocation("budget"), how)
    energy = float(((weight @ hessian) * weight).sum())
    mixed = [plan for plan in item.options if len(set(plan)) > 1]
    assert len(mixed) > 4
    sums, table = [], torch.tensor(item.why["distortion"])
    for plan, loss in zip(item.options, item.losses.tolist(), strict=True):
        assert loss == pytest.approx(0.5 * energy * left(weight, hessian, plan), rel=0.01), plan
        sums.append(float(table[torch.arange(len(plan)), torch.tensor(plan) - 1].sum()) / loss)
    assert max(sums) > 1.15


def test_the_published_range_has_no_candidate_without_a_promotion() -> None:
    assert "0" not in found(1.0, replace(TUNED, uniform=False)).why["error"]


def test_few_groups_keep_their_width() -> None:
    weight, hessian = layer(1.0)
    assert _by_errors(weight, hessian, QuantSpec(2, 48), TUNED, b"").widths == (2, 2)

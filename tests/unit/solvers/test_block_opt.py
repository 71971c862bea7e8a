"""The learning loop: the best iterate by batches that stay the same, and a run that goes wrong is told and survived."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import decode, encode
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.block_opt import Schedule, optimise
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.signround import SignRound

SPEC = QuantSpec(2, 16)


class Task:
    """Two layers in a row, four batches of inputs, and what the float layers make of them."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = {name: torch.randn(24, 24, generator=generator) / 24**0.5 for name in "ab"}
        low_rank = torch.randn(24, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
        mix = low_rank + 0.5 * torch.eye(24)
        self.inputs = [torch.randn(64, 24, generator=generator) @ mix for _ in range(4)]
        self.targets = [self.run(x, self.weights) for x in self.inputs]
        self.seen: list[int] = []

    def run(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return (x @ weights["a"].T).relu() @ weights["b"].T

    def loss(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        self.seen.append(batch)
        return (self.run(self.inputs[batch], weights) - self.targets[batch]).square().mean()

    def learnables(self) -> dict[str, SignRound]:
        return {name: SignRound(weight, SPEC) for name, weight in self.weights.items()}

    def total(self, best: Mapping[str, tuple[Tensor, object]], batches: list[int]) -> float:
        weights = {name: decode(codes, grid) for name, (codes, grid) in best.items()}  # type: ignore[arg-type]
        return sum(float(self.loss(batch, weights)) for batch in batches) / len(batches)


def test_no_steps_are_round_to_nearest() -> None:
    task = Task()
    outcome = optimise(task.learnables(), task.loss, [0, 1], [2], Schedule(steps=0))
    assert (outcome.step, outcome.steps, outcome.note) == (0, 0, None)
    assert outcome.before == outcome.after == pytest.approx(task.total(outcome.best, [2]), rel=1e-6)
    for name, (codes, grid) in outcome.best.items():
        exact = minmax_grid(task.weights[name], SPEC)
        assert torch.equal(codes, encode(task.weights[name], exact)) and torch.equal(grid.scale, exact.scale)


def test_learning_lowers_the_loss_and_the_best_iterate_is_what_is_returned() -> None:
    task = Task()
    outcome = optimise(task.learnables(), task.loss, [0, 1, 2], [2, 3], Schedule(steps=60, check_every=5))
    assert outcome.after < 0.8 * outcome.before and 0 < outcome.step <= 60 and outcome.steps == 60
    assert outcome.after == pytest.approx(task.total(outcome.best, [2, 3]), rel=1e-5)


def test_the_best_iterate_is_never_worse_than_the_first() -> None:
    task = Task()
    # Steps of two grid units throw every code about: nothing that is found can be better than the start.
    wild = Schedule(steps=10, rate=2.0, range_rate=0.5, check_every=1)
    outcome = optimise(task.learnables(), task.loss, [0, 1], [0, 1], wild)
    assert outcome.after <= outcome.before
    assert outcome.after == pytest.approx(task.total(outcome.best, [0, 1]), rel=1e-5)


def test_every_batch_comes_once_before_any_comes_again() -> None:
    task = Task()
    optimise(task.learnables(), task.loss, [0, 1, 2], [3], Schedule(steps=6, check_every=6))
    drawn = [batch for batch in task.seen if batch != 3]
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == [0, 1, 2]


def test_equal_seeds_give_equal_codes_and_others_do_not() -> None:
    def codes(seed: int) -> Tensor:
        task = Task()
        outcome = optimise(task.learnables(), task.loss, [0, 1, 2], [3], Schedule(steps=12, seed=seed, check_every=12))
        return torch.cat([part.flatten() for part, _ in outcome.best.values()])

    assert torch.equal(codes(1), codes(1)) and not torch.equal(codes(1), codes(2))


def test_accumulated_batches_count_as_one() -> None:
    # Signs of a sum of gradients: two batches at once are the batch of both.
    task = Task()
    one = task.learnables()
    optimise(one, task.loss, [0, 1], [3], Schedule(steps=1, accumulate=2))

    def both(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        return task.loss(0, weights) + task.loss(1, weights)

    other = task.learnables()
    optimise(other, both, [0], [0], Schedule(steps=1))
    for name in one:
        assert float((one[name].shift - other[name].shift).abs().mean()) < 1e-2  # but for ties of rounding errors


class Fake:
    """A weight that follows a script; learns nothing."""

    def __init__(self, script: list[float]) -> None:
        self.script = script
        self.at = 0
        self.rates: list[tuple[float, float]] = []

    def fake_quantized(self) -> Tensor:
        return torch.tensor([[self.script[self.at]]])

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        self.at += 1
        self.rates.append((rate, range_rate))

    def snapshot(self) -> int:
        return self.at


def play(script: list[float], **options: int) -> tuple[int, int, str | None]:
    schedule = Schedule(steps=len(script) - 1, check_every=1, **options)
    outcome = optimise({"w": Fake(script)}, lambda _, w: w["w"].sum(), [0], [0], schedule)
    assert outcome.best["w"] == outcome.step
    return outcome.step, outcome.steps, outcome.note


def test_what_goes_wrong_ends_the_run_and_keeps_the_best() -> None:
    assert play([3.0, 2.0, 1.0, 2.0]) == (2, 3, None)
    step, steps, note = play([3.0, 2.0, float("nan"), 1.0])
    assert (step, steps) == (1, 2) and note == "learning diverged at step 2 of 3; step 1 was kept"
    step, steps, note = play([3.0, 31.0, 1.0])
    assert (step, steps) == (0, 1) and note == "learning diverged at step 1 of 2; step 0 was kept"
    assert play([float("inf"), 1.0]) == (0, 0, "the loss is not finite at the start; the start was kept")


def test_a_loud_batch_is_no_divergence() -> None:
    """One batch a hundred times louder than those that decide; its own loss says nothing about the iterate."""
    loud = {0: 1.0, 1: 100.0}
    outcome = optimise(
        {"w": Fake([3.0, 2.0, 1.0])}, lambda batch, w: loud[batch] * w["w"].sum(), [1], [0], Schedule(2, check_every=1)
    )
    assert (outcome.step, outcome.note) == (2, None)


def test_a_batch_that_is_not_finite_ends_the_run_before_anything_moves() -> None:
    broken = {0: 1.0, 1: float("nan")}
    outcome = optimise({"w": Fake([3.0, 2.0])}, lambda batch, w: broken[batch] * w["w"].sum(), [1], [0], Schedule(1))
    assert (outcome.step, outcome.steps, outcome.best["w"]) == (0, 0, 0)
    assert outcome.note == "learning diverged at step 0 of 1; step 0 was kept"


def test_patience_ends_the_run() -> None:
    assert play([3.0, 2.0, 2.5, 2.4, 1.0], patience=2) == (1, 3, None)
    assert play([3.0, 2.0, 2.5, 2.4, 1.0]) == (4, 4, None)


@pytest.mark.parametrize("decay", [True, False])
def test_rates_fall_linearly_or_stay(decay: bool) -> None:
    fake = Fake([1.0] * 5)
    optimise({"w": fake}, lambda _, w: w["w"].sum(), [0], [0], Schedule(4, 0.8, 0.4, decay=decay))
    left = [1.0, 0.75, 0.5, 0.25] if decay else [1.0] * 4
    assert fake.rates == [(part * 0.8, part * 0.4) for part in left]


def test_a_loss_of_zero_is_fine() -> None:
    assert play([0.0, 0.0]) == (0, 1, None)


@pytest.mark.parametrize(
    ("train", "fixed", "options"),
    [
        ([], [0], {}),
        ([0], [], {}),
        ([0], [0], {"steps": -1}),
        ([0], [0], {"accumulate": 0}),
        ([0], [0], {"check_every": 0}),
    ],
)
def test_nonsense_is_refused(train: list[int], fixed: list[int], options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batches|positive"):
        optimise({"w": Fake([1.0])}, lambda _, w: w["w"].sum(), train, fixed, Schedule(**options))

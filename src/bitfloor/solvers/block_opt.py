"""The loop that learns the rounding of a block: draw a batch, compare, step; keep the best iterate.

Every method that learns by gradients runs through here. What is learnt is behind :class:`Learnable`: the loop asks it
for the fake-quantized weight, runs the block with it, and hands back the gradient. A weight is computed once per step
however many batches the step accumulates, and no graph reaches behind it, so a learnable needs no automatic
differentiation.

Which iterate is best is decided on batches that stay the same for the whole run: a mini-batch's own loss (what the code
of SignRound, arXiv 2309.05516, compares) says as much about the batch as about the iterate: a single token can be a
thousand times louder than the others. A loss that is not finite, or on the fixed batches ten times that of the start,
ends the run; the best iterate so far is kept and the reason reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

DIVERGED = 10.0  # times the loss of the start

Loss = Callable[[int, Mapping[str, Tensor]], Tensor]


class Learnable(Protocol):
    """The parameters behind one fake-quantized matrix."""

    def fake_quantized(self) -> Tensor:
        """The weight ``[O, I]`` float32 at the present parameters, outside of any graph."""

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """Move the parameters against the gradient ``[O, I]`` of the loss with respect to that weight."""

    def snapshot(self) -> Any:
        """What is needed of the present parameters later, as small as it can be."""


@dataclass(frozen=True)
class Schedule:
    """How to learn.

    Args:
        steps: updates; 0 keeps the start.
        rate: first step of the rounding, in steps of the grid. None is ``1 / steps``.
        range_rate: first step of the ranges; None is ``rate``.
        accumulate: batches whose gradients one update sums.
        check_every: updates between two looks at the fixed batches.
        patience: looks without a new best after which to stop; None = never.
        seed: of the order of batches.
        decay: both steps fall linearly to zero; otherwise they stay as they are.
    """

    steps: int = 200
    rate: float | None = None
    range_rate: float | None = None
    accumulate: int = 1
    check_every: int = 20
    patience: int | None = None
    seed: int = 0
    decay: bool = True


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Args:
        best: name to snapshot of the best iterate.
        step: its number of updates.
        steps: updates made.
        before, after: mean loss on the fixed batches at the start and at the best iterate.
        note: why the run ended early because something was wrong, or None.
    """

    best: dict[str, Any]
    step: int
    steps: int
    before: float
    after: float
    note: str | None = None


def optimise(
    learnables: Mapping[str, Learnable], loss: Loss, train: Sequence[int], fixed: Sequence[int], schedule: Schedule
) -> Outcome:
    """Learn, and return the best iterate.

    Args:
        learnables: by the name under which ``loss`` expects the weight.
        loss: ``loss(batch, weights)``: a scalar with a graph to the weights.
        train: batches to draw from: each once in random order, then all again in another.
        fixed: batches that decide which iterate is best.
        schedule: how to learn.

    Raises:
        ValueError: no batch to learn from or to decide by, or a negative number of steps.
    """
    if not train or not fixed:
        raise ValueError("learning needs batches to learn from and batches to decide by")
    if schedule.steps < 0 or schedule.accumulate < 1 or schedule.check_every < 1:
        raise ValueError("steps, batches a step and steps between two looks must be positive")
    rate = schedule.rate if schedule.rate is not None else 1.0 / max(schedule.steps, 1)
    range_rate = schedule.range_rate if schedule.range_rate is not None else rate
    draw = _draws(train, schedule.seed)
    before = after = _mean_loss(learnables, loss, fixed)
    best = {name: learnt.snapshot() for name, learnt in learnables.items()}
    found, looks, note, made = 0, 0, None, 0
    if not math.isfinite(before):
        return Outcome(best, 0, 0, before, before, "the loss is not finite at the start; the start was kept")
    for t in range(schedule.steps):
        left = 1.0 - t / schedule.steps if schedule.decay else 1.0
        last = _update(
            learnables, loss, [next(draw) for _ in range(schedule.accumulate)], left * rate, left * range_rate
        )
        sound = math.isfinite(last)  # otherwise nothing has moved
        made = t + 1 if sound else t
        if sound and made % schedule.check_every and made != schedule.steps:
            continue
        now = _mean_loss(learnables, loss, fixed) if sound else last
        if not now <= DIVERGED * before:
            note = f"learning diverged at step {made} of {schedule.steps}; step {found} was kept"
            break
        if now < after:
            best, after, found, looks = {n: learnt.snapshot() for n, learnt in learnables.items()}, now, made, 0
        else:
            looks += 1
        if schedule.patience is not None and looks >= schedule.patience:
            break
    return Outcome(best, found, made, before, after, note)


def _update(
    learnables: Mapping[str, Learnable], loss: Loss, batches: Sequence[int], rate: float, range_rate: float
) -> float:
    """One update; the summed loss of its batches. Nothing moves when that is not finite."""
    weights = {name: learnt.fake_quantized().requires_grad_() for name, learnt in learnables.items()}
    total = 0.0
    for batch in batches:
        with torch.enable_grad():
            value = loss(batch, weights)
        total += float(value.detach())
        if not math.isfinite(total):
            return total
        torch.autograd.backward(value)
    for name, learnt in learnables.items():
        grad = weights[name].grad
        if grad is not None:
            learnt.step(grad, rate, range_rate)
    return total


def _mean_loss(learnables: Mapping[str, Learnable], loss: Loss, batches: Sequence[int]) -> float:
    with torch.no_grad():
        weights = {name: learnt.fake_quantized() for name, learnt in learnables.items()}
        return sum(float(loss(batch, weights)) for batch in batches) / len(batches)


def _draws(batches: Sequence[int], seed: int) -> Any:
    """Batches without end: a random order of all, then another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for at in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[at]

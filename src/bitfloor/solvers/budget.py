"""Widths of many groups under one budget: what every group loses at every width, and what its codes cost.

| symbol | meaning |
| --- | --- |
| ``d[k, b]`` | distortion of group ``k`` at the ``b``-th width |
| ``c[k, b]`` | its cost, in bits |
| ``B`` | the budget |
| ``lambda`` | price of a bit |

    minimise  sum_k d[k, b_k]    subject to    sum_k c[k, b_k] <= B

At a price every group decides for itself, ``argmin_b d[k, b] + lambda c[k, b]``, and the total of those minima less
``lambda B`` is a lower bound of the best distortion within the budget (Lagrangian duality; Everett, 1963). The highest
bound is found by bisection on the price. The plan at that price may leave a few bits unspent: they go, greedily, to the
steps that gain most for a bit. The distance of what comes out from the bound is the most that any solver could still
gain, and it is reported; with thousands of groups it is less than one in ten thousand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.errors import InputError

ROUNDS = 200


@dataclass(frozen=True, eq=False)
class Allotment:
    """A choice for every group.

    Args:
        choice: ``[K]`` int64, index of the width.
        distortion: of the choice, in total.
        cost: in bits.
        bound: no choice within the budget has a lower distortion.
        price: distortion per bit at which the bound is reached.
    """

    choice: Tensor
    distortion: float
    cost: float
    bound: float
    price: float

    @property
    def gap(self) -> float:
        """The most, relative to the distortion, that the best choice could be better."""
        return max(0.0, 1.0 - self.bound / self.distortion) if self.distortion > 0 else 0.0


def allot(distortion: Tensor, cost: Tensor, budget: float) -> Allotment:
    """Choose a width for every group.

    Args:
        distortion: ``[K, B]``, finite and not negative.
        cost: ``[K, B]`` in bits.
        budget: bits.

    Raises:
        InputError: the budget is below the cost of the narrowest widths, or a distortion is not finite.
    """
    distortion, cost = distortion.double(), cost.double()
    if not bool(torch.isfinite(distortion).all()):
        raise InputError("a group's distortion is not finite; check the weights and the calibration text.")
    least = float(cost.amin(1).sum())
    if budget < least:
        raise InputError(
            f"a budget of {budget:,.0f} bits cannot be met: the narrowest widths take {least:,.0f}; "
            "raise the average, or allow narrower widths."
        )
    at = torch.arange(len(cost), device=cost.device)

    def choose(price: float) -> Tensor:
        # Of equals the first.
        return (distortion + price * cost).argmin(1)

    def spent(choice: Tensor) -> float:
        return float(cost[at, choice].sum())

    low, high = 0.0, 1.0
    if spent(choose(0.0)) <= budget:
        high = 0.0
    else:
        while spent(choose(high)) > budget:
            low, high = high, 2.0 * high
        for _ in range(ROUNDS):
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            low, high = (low, middle) if spent(choose(middle)) <= budget else (middle, high)
    choice = choose(high)
    bound = max(_bound(distortion, cost, budget, price) for price in (low, high))
    _spend_rest(choice, distortion, cost, budget - spent(choice))
    return Allotment(choice, float(distortion[at, choice].sum()), spent(choice), bound, high)


def _bound(distortion: Tensor, cost: Tensor, budget: float, price: float) -> float:
    return float((distortion + price * cost).amin(1).sum()) - price * budget


def _spend_rest(choice: Tensor, distortion: Tensor, cost: Tensor, rest: float) -> None:
    """Take, in place, the step that gains most for a bit, of those that fit, until none does."""
    at = torch.arange(len(cost), device=cost.device)
    while True:
        gain = distortion[at, choice].unsqueeze(1) - distortion
        extra = cost - cost[at, choice].unsqueeze(1)
        fits = (extra > 0) & (extra <= rest) & (gain > 0)
        if not bool(fits.any()):
            return
        worth = torch.where(fits, gain / extra.clamp_min(1e-300), -1.0)
        best = int(worth.argmax())
        group, width = divmod(best, cost.shape[1])
        rest -= float(extra[group, width])
        choice[group] = width

"""The choice of widths for the matrices of one budget, from what each would lose with each of some plans.

The budget is what uniform storage of the mean width takes, so a plan never needs more bytes than the model it is
measured against. Costs are stored bytes, padding and the orders of groups and channels included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.bit_plan import BitPlan, MatrixPlan
from bitfloor.core.bitpack import row_blocks
from bitfloor.core.errors import InputError
from bitfloor.core.spec import BITS, MatrixRef, QuantSpec
from bitfloor.pipeline.job import Allocation
from bitfloor.pipeline.layouts import stored_size
from bitfloor.solvers.budget import Allotment, allot

BYTE = 8
NEVER = 1e18  # cost of an option that a matrix does not have; nothing can pay it


@dataclass(frozen=True, eq=False)
class Item:
    """A matrix that shares a budget.

    Args:
        ref: the matrix.
        spec: its storage, widths aside.
        options: what it may be stored as: the width of every group.
        losses: ``[B]`` float64, nats a token that each option loses.
        budget: what the matrix brings into the common budget, in bits.
        why: the reasons, for the plan.
    """

    ref: MatrixRef
    spec: QuantSpec
    options: tuple[tuple[int, ...], ...]
    losses: Tensor
    budget: float
    why: Mapping[str, Any] = field(default_factory=dict)

    def costs(self) -> Tensor:
        """Stored bits of every option, float64 ``[B]``."""
        sizes = [BYTE * stored_size(self.ref, replace(self.spec, widths=own)) for own in self.options]
        return torch.tensor(sizes, dtype=torch.float64)


def as_sorted(spec: QuantSpec, sort: bool) -> QuantSpec:
    """The storage with an order of channels, for its size; which order makes no difference to that."""
    return replace(spec, channels=b"H") if sort else spec


def uniform_sizes(ref: MatrixRef, spec: QuantSpec, widths: Sequence[int]) -> list[int]:
    """Stored bits of a matrix if all its groups had one of the widths, by width."""
    return [BYTE * stored_size(ref, replace(spec, bits=bits, widths=())) for bits in widths]


def group_costs(ref: MatrixRef, spec: QuantSpec, widths: Sequence[float]) -> Tensor:
    """``c [G, B]`` float64: stored bits of every group at every width; a fractional width is interpolated."""
    rows, columns = ref.shape
    size = spec.columns_per_group(columns)
    padded = 16 * row_blocks(rows)
    taken = torch.tensor([min(size, columns - at) for at in range(0, columns, size)], dtype=torch.float64)
    more = [0.0 if w <= spec.centred else 16.0 if w == 1 else 0.0 if spec.symmetric else w for w in widths]
    side = torch.tensor([16.0 + own for own in more])
    return padded * (taken.unsqueeze(1) * torch.tensor(widths, dtype=torch.float64) + side)


def budget_bits(ref: MatrixRef, spec: QuantSpec, average: float | None) -> float:
    """What uniform storage of a mean width takes for one matrix, in bits; between two widths in proportion."""
    average = spec.bits if average is None else average
    low = max(bits for bits in BITS if bits <= average)
    high = min(bits for bits in BITS if bits >= average)
    share = (average - low) / (high - low) if high > low else 0.0
    sizes = uniform_sizes(ref, spec, (low, high))
    return (1.0 - share) * sizes[0] + share * sizes[1]


def brought(ref: MatrixRef, spec: QuantSpec, how: Allocation) -> float:
    """What a matrix of the blocks brings into the budget, in bits."""
    if how.stored is not None:
        return how.stored * ref.shape[0] * ref.shape[1]
    return budget_bits(ref, spec, how.average)


def mean_width(ref: MatrixRef, spec: QuantSpec, how: Allocation) -> float:
    """The mean width whose uniform storage takes what a matrix brings; the narrowest or widest where none does."""
    if how.stored is None:
        return spec.bits if how.average is None else how.average
    sizes = uniform_sizes(ref, spec, BITS)
    wanted = brought(ref, spec, how)
    for (low, below), (high, above) in pairwise(zip(BITS, sizes, strict=True)):
        if wanted < above:
            return low + (high - low) * max(0.0, (wanted - below) / (above - below))
    return BITS[-1]


def choose(model: str, allocation: Allocation, items: Mapping[str, Item]) -> BitPlan:
    """One option for every matrix, within the budget.

    Args:
        model: fingerprint.
        allocation: how.
        items: the matrices by name.

    Raises:
        InputError: a budget that cannot be met.
    """
    parts = [list(items)] if allocation.scope == "model" else [[name] for name in items]
    found: list[Allotment] = []
    chosen: dict[str, tuple[int, ...]] = {}
    costs = {name: item.costs() for name, item in items.items()}
    for part in filter(None, parts):
        own = [items[name] for name in part]
        found.append(within_budget(own, [costs[name] for name in part]))
        picked = zip(part, own, found[-1].choice.tolist(), strict=True)
        chosen.update({name: item.options[at] for name, item, at in picked})
    weights = sum(item.ref.shape[0] * item.ref.shape[1] for item in items.values())
    total = sum(allotment.distortion for allotment in found)
    bound = sum(allotment.bound for allotment in found)
    summary = {
        "bits_per_weight": sum(allotment.cost for allotment in found) / weights,
        "budget_bits_per_weight": sum(item.budget for item in items.values()) / weights,
        "distortion": total,
        "bound": bound,
        "gap": max(0.0, 1.0 - bound / total) if total > 0 else 0.0,
    }
    if allocation.scope == "model" and found:
        summary["price"] = found[0].price
    matrices = {}
    for name, item in items.items():
        size = item.spec.columns_per_group(item.ref.shape[1])
        basis = (item.spec.rotation, chosen[name], item.why, item.spec.channels)
        matrices[name] = MatrixPlan(item.ref.shape, size, *basis)
    settings = {"average": allocation.average, "widths": list(allocation.widths), "scope": allocation.scope}
    if allocation.stored is not None:
        settings["stored"] = allocation.stored
    if allocation.tables:
        settings["tables"] = list(allocation.tables)
    if allocation.sort:
        settings["sort"] = True
    return BitPlan(model, allocation.policy, matrices, settings, summary).sealed()


def within_budget(items: Sequence[Item], costs: Sequence[Tensor]) -> Allotment:
    """The choice of options for items with a common budget.

    Args:
        items: the matrices.
        costs: of their options.

    Raises:
        InputError: the budget is below what the smallest options take.
    """
    most = max(len(own) for own in costs)
    cost = torch.stack([_padded(own, most, NEVER) for own in costs])
    losses = torch.stack([_padded(item.losses, most, 0.0) for item in items])
    budget = sum(item.budget for item in items)
    if budget < float(cost.amin(1).sum()):
        raise InputError(
            "matrices that too few tokens of the survey reached keep their width, and leave too little of the budget "
            "for the others; raise the budget, or let the survey read more (allocation.sequences)."
        )
    return allot(losses, cost, budget)


def _padded(values: Tensor, count: int, fill: float) -> Tensor:
    """``[count]``: further options that nobody can choose."""
    return torch.cat([values.double(), values.new_full((count - len(values),), fill, dtype=torch.float64)])

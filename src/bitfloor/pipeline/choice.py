"""The choice of widths for the matrices of one budget, from what each of their groups would lose.

The budget is what uniform storage of the mean width takes, so a plan never needs more bytes than the model it is
measured against. What is not in the costs of single groups, padding and the order in which groups are stored, is paid
for from it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
HALVINGS = 24
NEVER = 1e18  # cost of a width that a matrix does not offer; nothing can pay it


@dataclass(frozen=True, eq=False)
class Item:
    """A matrix that shares a budget.

    Args:
        ref: the matrix.
        spec: its storage, widths aside.
        widths: to choose from, rising.
        losses: ``d [K, B]`` float64: nats a token; a row for each group, or one row if all groups have one width. NaN
            where nothing is known: the matrix then keeps its width.
        budget: what it brings into the common budget, in bits.
        why: what a plan says of the reasons, beside the losses.
    """

    ref: MatrixRef
    spec: QuantSpec
    widths: tuple[int, ...]
    losses: Tensor
    budget: float
    why: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether there is a choice to make."""
        return not bool(self.losses.isnan().any())

    @property
    def groups(self) -> int:
        return len(self.spec.group_widths(self.ref.shape[1]))

    def of_choice(self, choice: Tensor) -> tuple[int, ...]:
        """The width of every group for indices ``[K]`` into the widths."""
        found = tuple(self.widths[i] for i in choice.tolist())
        return found if len(found) == self.groups else found * self.groups

    def stored(self, widths: tuple[int, ...]) -> int:
        """Bits that it takes with these widths, padding and order included."""
        return BYTE * stored_size(self.ref, replace(self.spec, widths=widths))

    def sizes(self) -> list[int]:
        """Stored bits if all groups had one width, by width."""
        return uniform_sizes(self.ref, self.spec, self.widths)

    def costs(self) -> Tensor:
        """``c [K, B]`` float64: bits of every group at every width."""
        if len(self.losses) == self.groups:
            return group_costs(self.ref, self.spec, self.widths)
        return torch.tensor([self.sizes()], dtype=torch.float64)


def as_sorted(spec: QuantSpec, sort: bool) -> QuantSpec:
    """The storage with an order of channels, for its size; which order makes no difference to that."""
    return replace(spec, channels=(0,)) if sort else spec


def uniform_sizes(ref: MatrixRef, spec: QuantSpec, widths: Sequence[int]) -> list[int]:
    """Stored bits of a matrix if all its groups had one of the widths, by width."""
    return [BYTE * stored_size(ref, replace(spec, bits=bits, widths=())) for bits in widths]


def group_costs(ref: MatrixRef, spec: QuantSpec, widths: Sequence[float]) -> Tensor:
    """``c [G, B]`` float64: stored bits of every group at every width; a fractional width is interpolated."""
    rows, columns = ref.shape
    size = spec.columns_per_group(columns)
    padded = 16 * row_blocks(rows)
    taken = torch.tensor([min(size, columns - at) for at in range(0, columns, size)], dtype=torch.float64)
    side = torch.tensor([16.0 + (16.0 if w == 1 else 0.0 if spec.symmetric else w) for w in widths])
    return padded * (taken.unsqueeze(1) * torch.tensor(widths, dtype=torch.float64) + side)


def budget_bits(ref: MatrixRef, spec: QuantSpec, average: float | None) -> float:
    """What uniform storage of a mean width takes for one matrix, in bits; between two widths in proportion."""
    average = spec.bits if average is None else average
    low = max(bits for bits in BITS if bits <= average)
    high = min(bits for bits in BITS if bits >= average)
    share = (average - low) / (high - low) if high > low else 0.0
    sizes = uniform_sizes(ref, spec, (low, high))
    return (1.0 - share) * sizes[0] + share * sizes[1]


def choose(model: str, allocation: Allocation, items: Mapping[str, Item]) -> BitPlan:
    """Widths of all groups within the budget.

    Args:
        model: fingerprint.
        allocation: how.
        items: the matrices by name.

    Raises:
        InputError: a budget that cannot be met.
    """
    names = [name for name, item in items.items() if item.known]
    parts = [names] if allocation.scope == "model" else [[name] for name in names]
    widths = {n: item.spec.group_widths(item.ref.shape[1]) for n, item in items.items() if not item.known}
    # Those that keep their width pay for it from the common budget.
    spare = sum(items[name].budget - items[name].stored(own) for name, own in widths.items())
    found: list[Allotment] = []
    for part in filter(None, parts):
        own = [items[name] for name in part]
        found.append(within_budget(own, spare if allocation.scope == "model" else 0.0))
        widths.update(zip(part, _split(own, found[-1].choice), strict=True))
    stored = sum(item.stored(widths[name]) for name, item in items.items())
    weights = sum(item.ref.shape[0] * item.ref.shape[1] for item in items.values())
    total = sum(allotment.distortion for allotment in found)
    bound = sum(allotment.bound for allotment in found)
    summary = {
        "bits_per_weight": stored / weights,
        "budget_bits_per_weight": sum(item.budget for item in items.values()) / weights,
        "distortion": total,
        "bound": bound,
        "gap": max(0.0, 1.0 - bound / total) if total > 0 else 0.0,
    }
    if allocation.scope == "model" and found:
        summary["price"] = found[0].price
    matrices = {name: _planned(item, widths[name]) for name, item in items.items()}
    settings = {"average": allocation.average, "widths": list(allocation.widths), "scope": allocation.scope}
    if allocation.tables:
        settings["tables"] = list(allocation.tables)
    if allocation.sort:
        settings["sort"] = True
    return BitPlan(model, allocation.policy, matrices, settings, summary)


def _planned(item: Item, widths: tuple[int, ...]) -> MatrixPlan:
    size = item.spec.columns_per_group(item.ref.shape[1])
    why: dict[str, Any] = {"note": "too few tokens of the survey entered it; all groups keep its width"}
    if item.known:
        why = {"distortion": [[float(f"{value:.6g}") for value in row] for row in item.losses.tolist()], **item.why}
    return MatrixPlan(item.ref.shape, size, item.spec.rotation, widths, why, item.spec.channels)


def _split(items: Sequence[Item], choice: Tensor) -> list[tuple[int, ...]]:
    """The widths of every item's groups, from the choices of all rows of all items."""
    parts = torch.split(choice, [len(item.losses) for item in items])
    return [item.of_choice(own) for item, own in zip(items, parts, strict=True)]


def within_budget(items: Sequence[Item], spare: float = 0.0) -> Allotment:
    """A choice whose stored bytes, padding and order included, keep to the items' common budget.

    Args:
        items: with losses that are known.
        spare: bits that are added to what the items bring.

    Raises:
        InputError: the budget is below what the narrowest widths take.
    """
    most = max(len(item.widths) for item in items)
    cost = torch.cat([_padded(item.costs(), most, NEVER) for item in items])
    distortion = torch.cat([_padded(item.losses, most, 0.0) for item in items])
    budget = spare + sum(item.budget for item in items)

    def within(bits: float) -> tuple[Allotment, bool]:
        found = allot(distortion, cost, bits)
        widths = _split(items, found.choice)
        return found, sum(item.stored(own) for item, own in zip(items, widths, strict=True)) <= budget

    least = float(cost.amin(1).sum())
    if budget < sum(min(item.sizes()) for item in items):
        raise InputError(
            "matrices that too few tokens of the survey reached keep their width, and leave too little of the budget "
            "for the others; raise allocation.average, or let the survey read more (allocation.sequences)."
        )
    best, fits = within(budget)
    if fits:
        return best
    bound = best.bound
    # Padding and the order of groups are not in the costs: what they take is found by halving.
    best, fits = within(least)
    low, high = least, budget
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        found, small = within(middle)
        if small:
            best, fits, low = found, True, middle
        else:
            high = middle
    if fits:
        return replace(best, bound=bound)
    # Padding took what was left: each matrix by itself as small as it can be.
    smallest = [torch.full((len(item.losses),), item.sizes().index(min(item.sizes()))) for item in items]
    choice = torch.cat(smallest)
    at = torch.arange(len(choice))
    return Allotment(choice, float(distortion[at, choice].sum()), float(cost[at, choice].sum()), bound, best.price)


def _padded(values: Tensor, columns: int, fill: float) -> Tensor:
    """``[K, columns]``: further widths that nobody can choose."""
    extra = values.new_full((len(values), columns - values.shape[1]), fill)
    return torch.cat([values, extra], 1) if extra.numel() else values

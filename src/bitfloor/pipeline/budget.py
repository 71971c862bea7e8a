"""The whole model's widths under one budget: a survey, what each group would lose, and the choice.

| symbol | meaning |
| --- | --- |
| ``r, H'`` | what is at stake in a matrix, :mod:`bitfloor.pipeline.survey` |
| ``e_ij`` | scaled error of GPTQ at weight ``ij``, all groups at width ``b``, against ``H'`` |
| ``d[k, b]`` | ``sum_i r_i sum_{j in k} e_ij^2 / 2``: nats a token that the distribution moves by |
| ``c[k, b]`` | stored bits of the group: codes, scales, zero-points or offsets, padding |

GPTQ's scaled errors split the error of the output among columns exactly, ``(D H D^T)_ii = sum_j e_ij^2``, each with
what the columns behind it have made up for.

The budget is what uniform storage of the mean width takes, so a plan never needs more bytes than the model it is
measured against. The order in which groups are stored is paid for from it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bitfloor.calib.block import BlockRunner
from bitfloor.core.affine import Grid
from bitfloor.core.bit_plan import BitPlan, MatrixPlan
from bitfloor.core.bitpack import row_blocks
from bitfloor.core.errors import InputError
from bitfloor.core.rotation import rotate
from bitfloor.core.spec import BITS, MatrixRef, QuantSpec
from bitfloor.methods.gptq import MIN_TOKENS_PER_CHANNEL
from bitfloor.methods.options import GptqConfig
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.job import Allocation, Assignment, Job
from bitfloor.pipeline.layouts import stored_size
from bitfloor.pipeline.run import RunOptions
from bitfloor.pipeline.survey import Stakes, SurveyOptions, survey
from bitfloor.solvers.budget import Allotment, allot
from bitfloor.solvers.gptq import GridSearch, factorise, gptq
from bitfloor.solvers.ranges import search_grid, tempered
from bitfloor.solvers.slim_bits import candidates

BYTE = 8
HALVINGS = 24


def plan_by_budget(
    source: SourceModel, job: Job, assignment: Assignment, batches: Sequence[Tensor], options: RunOptions, folder: Path
) -> BitPlan:
    """Survey the float model and choose the width of every group.

    Args:
        source: the float model.
        job: with an allocation of policy ``"budget"``.
        assignment: the storage of every matrix, widths aside.
        batches: calibration tokens.
        options: device and progress.
        folder: for what enters each block while the survey runs.

    Raises:
        InputError: a budget that cannot be met.
        BitfloorError: gradients that are not finite.
    """
    assert job.allocation is not None
    specs = {name: spec for name, spec in assignment.specs.items() if assignment.refs[name].block >= 0}
    tables: dict[str, Tensor] = {}
    widths = job.allocation.widths

    how = search_of(job)

    def visit(runner: BlockRunner, stakes: Mapping[str, Stakes]) -> None:
        for name, own in stakes.items():
            tables[name] = distortions(runner.weight(name), own, specs[name], widths, how)

    looking = SurveyOptions(job.products, options.device, int(job.recipe.get("seed", 0)), folder)
    rotations = {name: spec.rotation for name, spec in specs.items()}
    survey(source, few(batches, job.allocation.sequences), rotations, visit, looking)
    tables = {name: tables[name].cpu() for name in specs}
    return choose(source.fingerprint, job.allocation, specs, assignment.refs, tables)


def few(batches: Sequence[Tensor], sequences: int | None) -> list[Tensor]:
    """The first sequences of the batches, all for None."""
    if sequences is None:
        return list(batches)
    left, found = sequences, []
    for batch in batches:
        found.append(batch[:left])
        left -= len(found[-1])
    return [batch for batch in found if len(batch)]


def search_of(job: Job) -> GptqConfig:
    """GPTQ as the survey runs it: with the importance and damping of the job's method, where it has them."""
    own = job.recipe.get("method", {})
    known = {key: own[key] for key in ("importance", "damping") if key in own}
    return GptqConfig(**{"importance": 0.5, "damping": 0.05, "static_groups": False, **known})


def distortions(weight: Tensor, stakes: Stakes, spec: QuantSpec, widths: Sequence[int], how: GptqConfig) -> Tensor:
    """``d [G, B]`` float64 of one matrix; NaN where too few tokens entered it to say anything.

    Args:
        weight: ``[O, I]`` float32, as the model has it.
        stakes: of its rotated inputs, if it will be rotated.
        spec: storage.
        widths: to be tried.
        how: options of GPTQ.
    """
    weight = rotate(weight, spec.rotation)
    columns = weight.shape[1]
    size = spec.columns_per_group(columns)
    groups = -(-columns // size)
    hessian = stakes.hessian
    if stakes.tokens < MIN_TOKENS_PER_CHANNEL * columns or not float(hessian.diagonal().sum()) > 0:
        return torch.full((groups, len(widths)), torch.nan, dtype=torch.float64)
    importance = tempered(hessian.diagonal(), how.importance)
    factor = factorise(hessian, size, damping=how.damping, act_order=True, whole_groups=True)
    found = []
    for bits in widths:
        own = replace(spec, bits=bits, group_size=size, widths=())

        def find(_: int, part: Tensor, at: Tensor, own: QuantSpec = own) -> Grid:
            return search_grid(part, importance[at], own)

        result = gptq(weight, hessian, GridSearch(size, find), factor=factor, counted=stakes.rows)
        assert result.errors is not None
        found.append(0.5 * result.errors)
    return torch.stack(found, 1)


def group_costs(ref: MatrixRef, spec: QuantSpec, widths: Sequence[float]) -> Tensor:
    """``c [G, B]`` float64: stored bits of every group at every width; a fractional width is interpolated."""
    rows, columns = ref.shape
    size = spec.columns_per_group(columns)
    padded = 16 * row_blocks(rows)
    taken = torch.tensor([min(size, columns - at) for at in range(0, columns, size)], dtype=torch.float64)
    side = torch.tensor([16.0 + (16.0 if w == 1 else 0.0 if spec.symmetric else w) for w in widths])
    return padded * (taken.unsqueeze(1) * torch.tensor(widths, dtype=torch.float64) + side)


def choose(
    model: str,
    allocation: Allocation,
    specs: Mapping[str, QuantSpec],
    refs: Mapping[str, MatrixRef],
    tables: Mapping[str, Tensor],
) -> BitPlan:
    """Widths of all groups within the budget.

    Args:
        model: fingerprint.
        allocation: how.
        specs: storage of the matrices, widths aside.
        refs: the matrices.
        tables: ``d [G, B]`` by name.

    Raises:
        InputError: a budget that cannot be met.
    """
    unseen = [name for name in specs if bool(tables[name].isnan().any())]
    names = [name for name in specs if name not in unseen]
    parts = [names] if allocation.scope == "model" else [[name] for name in names]
    widths = {name: specs[name].group_widths(refs[name].shape[1]) for name in unseen}
    found: list[Allotment] = []
    # Those that keep their width pay for it from the common budget.
    spare = sum(budget_bits(refs[n], specs[n], allocation) - BYTE * stored_size(refs[n], specs[n]) for n in unseen)
    for part in filter(None, parts):
        allotment = _within(part, allocation, specs, refs, tables, spare if allocation.scope == "model" else 0.0)
        found.append(allotment)
        choices = torch.split(allotment.choice, [len(tables[name]) for name in part])
        for name, choice in zip(part, choices, strict=True):
            widths[name] = tuple(allocation.widths[i] for i in choice.tolist())
    stored = BYTE * sum(stored_size(refs[n], replace(specs[n], widths=widths[n])) for n in specs)
    weights = sum(refs[n].shape[0] * refs[n].shape[1] for n in specs)
    total = sum(allotment.distortion for allotment in found)
    bound = sum(allotment.bound for allotment in found)
    summary = {
        "bits_per_weight": stored / weights,
        "budget_bits_per_weight": sum(budget_bits(refs[n], specs[n], allocation) for n in specs) / weights,
        "distortion": total,
        "bound": bound,
        "gap": max(0.0, 1.0 - bound / total) if total > 0 else 0.0,
    }
    if allocation.scope == "model" and found:
        summary["price"] = found[0].price
    note = {"note": "too few tokens of the survey entered it; all groups keep its width"}
    matrices = {
        name: MatrixPlan(
            refs[name].shape,
            specs[name].columns_per_group(refs[name].shape[1]),
            specs[name].rotation,
            widths[name],
            note
            if name in unseen
            else {"distortion": [[float(f"{value:.6g}") for value in row] for row in tables[name].tolist()]},
        )
        for name in specs
    }
    settings = {"average": allocation.average, "widths": list(allocation.widths), "scope": allocation.scope}
    return BitPlan(model, allocation.policy, matrices, settings, summary)


def budget_bits(ref: MatrixRef, spec: QuantSpec, allocation: Allocation) -> float:
    """What uniform storage of the mean width takes for one matrix, in bits; between two widths in proportion."""
    average = spec.bits if allocation.average is None else allocation.average
    low = max(bits for bits in BITS if bits <= average)
    high = min(bits for bits in BITS if bits >= average)
    share = (average - low) / (high - low) if high > low else 0.0
    sizes = [BYTE * stored_size(ref, replace(spec, bits=bits, widths=())) for bits in (low, high)]
    return (1.0 - share) * sizes[0] + share * sizes[1]


def check_budget(job: Job, assignment: Assignment) -> None:
    """Refuse a budget that the narrowest widths exceed, before anything is read.

    Raises:
        InputError: naming the budget and what the narrowest widths take.
    """
    how = job.allocation
    if how is None or job.searches != "budget":
        return
    names = [name for name in assignment.specs if assignment.refs[name].block >= 0]
    for part in [names] if how.scope == "model" else [[name] for name in names]:
        pairs = [(assignment.refs[name], assignment.specs[name]) for name in part]
        budget = sum(budget_bits(ref, spec, how) for ref, spec in pairs)
        least = sum(min(sizes_of(ref, spec, how.widths)) for ref, spec in pairs)
        if budget < least and pairs:
            weights = sum(ref.shape[0] * ref.shape[1] for ref, _ in pairs)
            raise InputError(
                f"allocation of {'the model' if len(part) > 1 else part[0]}: a budget of {budget / weights:.3f} stored "
                f"bits a weight cannot be met, the narrowest of the widths {list(how.widths)} take "
                f"{least / weights:.3f}; raise allocation.average, or allow narrower widths."
            )


def sizes_of(ref: MatrixRef, spec: QuantSpec, widths: Sequence[int]) -> list[float]:
    """Stored bits of a matrix if all its groups had one of the widths, by width."""
    return [float(BYTE * stored_size(ref, replace(spec, bits=bits, widths=()))) for bits in widths]


def promised_bits(job: Job, assignment: Assignment) -> float:
    """Bits that the matrices of the blocks will take at most, where widths are still to be found."""
    assert job.allocation is not None
    total = 0.0
    for name, spec in assignment.specs.items():
        ref = assignment.refs[name]
        if ref.block >= 0:
            total += budget_bits(ref, spec, job.allocation) if job.searches == "budget" else most_by_sba(ref, spec)
    return total


def most_by_sba(ref: MatrixRef, spec: QuantSpec) -> float:
    """The most bits that SBA stores a matrix in, over the numbers of groups it may promote, whichever they are."""
    groups = len(spec.group_widths(ref.shape[1]))
    found = []
    for p in candidates(groups, True):
        # Where the short last group goes decides how much is padded; whatever it is, it is less than a tile a segment.
        widths = (spec.bits - 1,) * p + (spec.bits + 1,) * p + (spec.bits,) * (groups - 2 * p)
        orders = {widths, widths[::-1], (*widths[p:], *widths[:p])}
        sizes = [stored_size(ref, replace(spec, widths=order)) for order in orders]
        order_bytes = max(0, groups * (1 if groups <= 256 else 2)) if p else 0
        found.append(BYTE * (max(sizes) + order_bytes))
    return float(max(found))


def _within(
    part: Sequence[str],
    allocation: Allocation,
    specs: Mapping[str, QuantSpec],
    refs: Mapping[str, MatrixRef],
    tables: Mapping[str, Tensor],
    spare: float,
) -> Allotment:
    """A choice whose stored bytes, padding and order included, keep to the budget of the matrices of ``part``."""
    cost = torch.cat([group_costs(refs[n], specs[n], allocation.widths) for n in part])
    distortion = torch.cat([tables[n] for n in part])
    budget = spare + sum(budget_bits(refs[n], specs[n], allocation) for n in part)

    def within(bits: float) -> tuple[Allotment, bool]:
        found = allot(distortion, cost, bits)
        choices = torch.split(found.choice, [len(tables[n]) for n in part])
        stored = sum(
            BYTE * stored_size(refs[n], replace(specs[n], widths=tuple(allocation.widths[i] for i in c.tolist())))
            for n, c in zip(part, choices, strict=True)
        )
        return found, stored <= budget

    least = float(cost.amin(1).sum())
    if budget < sum(min(sizes_of(refs[n], specs[n], allocation.widths)) for n in part):
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
    smallest = []
    for name in part:
        sizes = sizes_of(refs[name], specs[name], allocation.widths)
        smallest.append(torch.full((len(tables[name]),), sizes.index(min(sizes))))
    choice = torch.cat(smallest)
    at = torch.arange(len(choice))
    return Allotment(choice, float(distortion[at, choice].sum()), float(cost[at, choice].sum()), bound, best.price)

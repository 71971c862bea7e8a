"""The whole model's widths under one budget: a survey, what each group would lose, and the choice.

| symbol | meaning |
| --- | --- |
| ``F [O, I]`` | Fisher information of a matrix's weights, :mod:`bitfloor.pipeline.survey` |
| ``d[k, b]`` | ``sum_k F (W_b - W)^2 / 2`` over the weights of group ``k``, rounded at width ``b``: nats a token |
| ``c[k, b]`` | stored bits of the group: codes, scales, zero-points or offsets, padding |

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
from bitfloor.core.affine import decode, encode
from bitfloor.core.bit_plan import BitPlan, MatrixPlan
from bitfloor.core.bitpack import row_blocks
from bitfloor.core.errors import InputError
from bitfloor.core.rotation import rotate
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.job import Allocation, Assignment, Job
from bitfloor.pipeline.layouts import stored_size
from bitfloor.pipeline.run import RunOptions
from bitfloor.pipeline.survey import SurveyOptions, survey
from bitfloor.solvers.budget import Allotment, allot
from bitfloor.solvers.ranges import grouped, search_grid

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

    def visit(_: int, runner: BlockRunner, fisher: Mapping[str, Tensor]) -> None:
        for name, own in fisher.items():
            tables[name] = distortions(runner.weight(name), own, specs[name], widths)

    how = SurveyOptions(job.products, options.device, int(job.recipe.get("seed", 0)), folder)
    rotations = {name: spec.rotation for name, spec in specs.items()}
    survey(source, few(batches, job.allocation.sequences), rotations, visit, how)
    tables = {name: tables[name].cpu() for name in specs}
    return choose(source.fingerprint, job.allocation, specs, assignment.refs, tables)


def few(batches: Sequence[Tensor], sequences: int | None) -> list[Tensor]:
    """The first sequences of the batches, all for None."""
    rows = torch.cat(list(batches)) if len({batch.shape[1] for batch in batches}) == 1 else None
    if sequences is None or rows is None:
        return list(batches)
    return list(torch.split(rows[:sequences], len(batches[0])))


def distortions(weight: Tensor, fisher: Tensor, spec: QuantSpec, widths: Sequence[int]) -> Tensor:
    """``d [G, B]`` float64 of one matrix.

    Args:
        weight: ``[O, I]`` float32, as the model has it.
        fisher: ``[O, I]``, rotated as the matrix will be.
        spec: storage.
        widths: to be tried.
    """
    weight = rotate(weight, spec.rotation)
    importance = fisher.sum(0)
    size = spec.columns_per_group(weight.shape[1])
    found = []
    for bits in widths:
        grid = search_grid(weight, importance, replace(spec, bits=bits, widths=()))
        loss = (decode(encode(weight, grid), grid) - weight).square_().mul_(fisher)
        found.append(0.5 * grouped(loss.sum(0, dtype=torch.float64), size).sum(-1))
    return torch.stack(found, 1)


def group_bits(ref: MatrixRef, spec: QuantSpec, widths: Sequence[float]) -> Tensor:
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
    names = list(specs)
    parts = [names] if allocation.scope == "model" else [[name] for name in names]
    widths: dict[str, tuple[int, ...]] = {}
    found: list[Allotment] = []
    for part in parts:
        allotment = _within(part, allocation, specs, refs, tables)
        found.append(allotment)
        choices = torch.split(allotment.choice, [len(tables[name]) for name in part])
        for name, choice in zip(part, choices, strict=True):
            widths[name] = tuple(allocation.widths[i] for i in choice.tolist())
    stored = BYTE * sum(stored_size(refs[n], replace(specs[n], widths=widths[n])) for n in names)
    weights = sum(refs[n].shape[0] * refs[n].shape[1] for n in names)
    total = sum(allotment.distortion for allotment in found)
    bound = sum(allotment.bound for allotment in found)
    summary = {
        "bits_per_weight": stored / weights,
        "budget_bits_per_weight": sum(budget_bits(refs[n], specs[n], allocation) for n in names) / weights,
        "distortion": total,
        "bound": bound,
        "gap": max(0.0, 1.0 - bound / total) if total > 0 else 0.0,
    }
    if allocation.scope == "model":
        summary["price"] = found[0].price
    matrices = {
        name: MatrixPlan(
            refs[name].shape,
            specs[name].columns_per_group(refs[name].shape[1]),
            specs[name].rotation,
            widths[name],
            {"distortion": [[float(f"{value:.6g}") for value in row] for row in tables[name].tolist()]},
        )
        for name in names
    }
    settings = {"average": allocation.average, "widths": list(allocation.widths), "scope": allocation.scope}
    return BitPlan(model, allocation.policy, matrices, settings, summary)


def budget_bits(ref: MatrixRef, spec: QuantSpec, allocation: Allocation) -> float:
    """What uniform storage of the mean width takes for one matrix, in bits."""
    average = spec.bits if allocation.average is None else allocation.average
    if average == 1:  # one bit is stored with offsets
        return float(group_bits(ref, spec, (1,)).sum())
    return float(group_bits(ref, replace(spec, widths=()), (average,)).sum())


def _within(
    part: Sequence[str],
    allocation: Allocation,
    specs: Mapping[str, QuantSpec],
    refs: Mapping[str, MatrixRef],
    tables: Mapping[str, Tensor],
) -> Allotment:
    """A choice whose stored bytes, padding and order included, keep to the budget of the matrices of ``part``."""
    cost = torch.cat([group_bits(refs[n], specs[n], allocation.widths) for n in part])
    distortion = torch.cat([tables[n] for n in part])
    budget = sum(budget_bits(refs[n], specs[n], allocation) for n in part)

    def within(bits: float) -> tuple[Allotment, bool]:
        found = allot(distortion, cost, bits)
        choices = torch.split(found.choice, [len(tables[n]) for n in part])
        stored = sum(
            BYTE * stored_size(refs[n], replace(specs[n], widths=tuple(allocation.widths[i] for i in c.tolist())))
            for n, c in zip(part, choices, strict=True)
        )
        return found, stored <= budget

    least = float(cost.amin(1).sum())
    try:
        best, fits = within(budget)
        if fits:
            return best
        # Padding and the order of groups are not in the costs: what they take is found by halving.
        best, fits = within(least)
    except InputError as error:
        raise InputError(f"allocation of {'the model' if len(part) > 1 else part[0]}: {error}") from error
    low, high = least, budget
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        found, small = within(middle)
        if small:
            best, fits, low = found, True, middle
        else:
            high = middle
    if fits:
        return best
    raise InputError(
        f"no plan keeps the stored bytes of {part[0]} within the budget; its groups are small beside what their order "
        "takes: raise the average, or use larger groups."
    )

"""The whole model's widths under one budget: a survey, what each group would lose, and the choice.

| symbol | meaning |
| --- | --- |
| ``r, H'`` | what is at stake in a matrix, :mod:`bitfloor.pipeline.survey` |
| ``e_ij`` | scaled error of GPTQ at weight ``ij``, all groups at width ``b``, against ``H'`` |
| ``d[k, b]`` | ``sum_i r_i sum_{j in k} e_ij^2 / 2``: nats a token that the distribution moves by |
| ``c[k, b]`` | stored bits of the group: codes, scales, zero-points or offsets, padding |

GPTQ's scaled errors split the error of the output among columns exactly, ``(D H D^T)_ii = sum_j e_ij^2``, each with
what the columns behind it have made up for. From these come plans for single matrices (:func:`proposals`); what each
plan loses is then found by GPTQ with its widths, and among those the budget chooses. What embedding and head would lose
is measured instead (:mod:`bitfloor.pipeline.survey_ends`), in the same unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bitfloor.calib.block import BlockRunner
from bitfloor.core.bit_plan import BitPlan
from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.methods.gptq import MIN_TOKENS_PER_CHANNEL, Errors
from bitfloor.methods.options import GptqConfig
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.choice import (
    BYTE,
    Item,
    as_sorted,
    brought,
    budget_bits,
    choose,
    group_costs,
    mean_width,
    uniform_sizes,
)
from bitfloor.pipeline.job import Allocation, Assignment, Job
from bitfloor.pipeline.layouts import stored_size
from bitfloor.pipeline.run import RunOptions
from bitfloor.pipeline.survey import Stakes, SurveyOptions, survey
from bitfloor.pipeline.survey_ends import Ends
from bitfloor.solvers.budget import allot
from bitfloor.solvers.slim_bits import candidates

# Mean widths, from the average, for which a matrix is asked what its best plan would lose.
AROUND = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


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
    how = job.allocation
    assert how is not None
    specs = {name: spec for name, spec in assignment.specs.items() if assignment.refs[name].block >= 0}
    items: dict[str, Item] = {}
    search = search_of(job)

    def visit(runner: BlockRunner, stakes: Iterator[tuple[str, Stakes]]) -> None:
        for name, own in stakes:
            spec = replace(specs[name], channels=own.basis.channels)
            items[name] = item_of(assignment.refs[name], spec, runner.weight(name), own, how, search)

    looking = SurveyOptions(job.products, options.device, int(job.recipe.get("seed", 0)), folder, how.sort)
    rotations = {name: spec.rotation for name, spec in specs.items()}
    by_logits = job.head_by_logits
    ends = Ends(source, assignment, how.tables, looking, by_logits=by_logits) if how.tables else None
    survey(source, few(batches, how.sequences), rotations, visit, looking, ends)
    tables = {} if ends is None else ends.items()
    return choose(source.fingerprint, how, {**{name: items[name] for name in specs}, **tables})


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


def item_of(
    ref: MatrixRef, spec: QuantSpec, weight: Tensor, stakes: Stakes, allocation: Allocation, search: GptqConfig
) -> Item:
    """A matrix with the plans it may be stored by, and what GPTQ with each would lose.

    Plans are all groups at one width, and for some mean widths the best by the groups' own losses. Those are not the
    whole truth: a coarse group pushes its error into the groups behind it, which then lose more, or less if they are
    fine. So every plan is tried, and what GPTQ leaves with it is what counts.

    Args:
        ref: the matrix.
        spec: its storage, widths aside; channels as in the basis of ``stakes``.
        weight: ``[O, I]`` float32, as the model has it.
        stakes: what is known of it.
        allocation: widths and average.
        search: options of GPTQ.
    """
    columns = weight.shape[1]
    # The order of channels is paid for from the budget of a matrix without one.
    plain = replace(spec, channels=b"")
    budget = brought(ref, plain, allocation)
    groups = len(spec.group_widths(columns))
    if stakes.tokens < MIN_TOKENS_PER_CHANNEL * columns or not float(stakes.hessian.diagonal().sum()) > 0:
        note = {"note": "too few tokens of the survey entered it; all groups keep its width"}
        # Nor does it get an order of channels, which the few tokens would decide.
        return Item(ref, plain, (spec.group_widths(columns),), torch.zeros(1), budget, note)
    errors = Errors(stakes.basis.to(weight), stakes.hessian, stakes.rows, spec, search)
    uniform = [(bits,) * groups for bits in allocation.widths]
    table = 0.5 * torch.stack([errors.of(plan).cpu() for plan in uniform], 1)
    losses = dict(zip(uniform, table.sum(0).tolist(), strict=True))
    for plan in proposals(table, ref, spec, allocation.widths, mean_width(ref, plain, allocation)):
        if plan not in losses:
            losses[plan] = 0.5 * float(errors.of(plan).sum())
    told = [[float(f"{value:.6g}") for value in row] for row in table.tolist()]
    tried = [[float(f"{sum(plan) / groups:.6g}"), float(f"{loss:.6g}")] for plan, loss in losses.items()]
    why = {"distortion": told, "tried": tried}
    return Item(ref, spec, tuple(losses), torch.tensor(list(losses.values()), dtype=torch.float64), budget, why)


def proposals(
    table: Tensor, ref: MatrixRef, spec: QuantSpec, widths: Sequence[int], average: float
) -> list[tuple[int, ...]]:
    """Widths of every group for mean widths around the average, best by the groups' own losses ``[G, B]``."""
    cost = group_costs(ref, spec, widths)
    orders = BYTE * (len(table) * (1 if len(table) <= 256 else 2))
    found = []
    for target in dict.fromkeys(min(max(average + step, widths[0]), widths[-1]) for step in AROUND):
        budget = budget_bits(ref, replace(spec, channels=b""), target) - orders
        budget -= BYTE * (stored_size(ref, spec) - stored_size(ref, replace(spec, channels=b"")))
        if budget >= float(cost.amin(1).sum()):
            found.append(tuple(widths[i] for i in allot(table, cost, budget).choice.tolist()))
    return found


def check_budget(job: Job, assignment: Assignment) -> None:
    """Refuse a budget that the narrowest widths exceed, before anything is read.

    Raises:
        InputError: naming the budget and what the narrowest widths take.
    """
    how = job.allocation
    if how is None or job.searches != "budget":
        return
    names = [name for name in assignment.specs if assignment.refs[name].block >= 0]
    if not names:
        raise InputError(
            "allocation has nothing to allocate: the recipe keeps every matrix of the blocks; leave it out."
        )
    if how.tables and not tables_of(job, assignment):
        raise InputError(
            "allocation.tables: embedding and head are left at 16 bits; leave tables out, or quantize them."
        )
    for part in [names] if how.scope == "model" else [[name] for name in names]:
        pairs = [(assignment.refs[name], assignment.specs[name]) for name in part]
        budget = sum(brought(ref, spec, how) for ref, spec in pairs)
        least = sum(min(uniform_sizes(ref, as_sorted(spec, how.sort), how.widths)) for ref, spec in pairs)
        shared = tables_of(job, assignment)
        for ref, spec in shared:
            budget += budget_bits(ref, spec, None)
            least += min(uniform_sizes(ref, spec, how.tables))
        if budget < least:
            weights = sum(ref.shape[0] * ref.shape[1] for ref, _ in (*pairs, *shared))
            narrow = f"{list(how.widths)}" + (f" and tables {list(how.tables)}" if shared else "")
            raise InputError(
                f"allocation of {'the model' if len(part) > 1 else part[0]}: a budget of {budget / weights:.3f} stored "
                f"bits a weight cannot be met, the narrowest of the widths {narrow} take "
                f"{least / weights:.3f}; raise allocation.{'average' if how.stored is None else 'stored'}, or allow "
                "narrower widths."
            )


def tables_of(job: Job, assignment: Assignment) -> list[tuple[MatrixRef, QuantSpec]]:
    """Embedding and head, as far as they are quantized and share the budget."""
    if job.allocation is None or not job.allocation.tables:
        return []
    return [(assignment.refs[n], spec) for n, spec in assignment.specs.items() if assignment.refs[n].block < 0]


def promised_bits(job: Job, assignment: Assignment) -> float:
    """Bits that the matrices of the blocks will take at most, where widths are still to be found.

    Where embedding and head share the budget, it is all of them together that keep to it.
    """
    how = job.allocation
    assert how is not None
    total = 0.0
    for name, spec in assignment.specs.items():
        ref = assignment.refs[name]
        if ref.block >= 0 and job.searches == "budget":
            total += brought(ref, spec, how)
        elif ref.block >= 0:
            total += most_by_sba(ref, as_sorted(spec, how.sort))
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

"""Where the widths of groups come from: a plan that is given, a budget solved before the first block, or the blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from bitfloor.core.bit_plan import BitPlan, MatrixPlan, parse_plan
from bitfloor.core.errors import InputError
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.budget import plan_by_budget
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.journal import PLAN, Entry, Journal
from bitfloor.pipeline.layouts import stored_size
from bitfloor.pipeline.run import RunOptions
from bitfloor.pipeline.sizes import stored_bytes

SURVEY = "survey"  # folder in the journal, for what enters each block


def with_plan(source: SourceModel, assignment: Assignment, plan: BitPlan) -> Assignment:
    """The assignment with a plan's widths for the matrices of the blocks, and for embedding and head if it has them.

    Raises:
        InputError: the plan does not fit the model or the recipe.
    """
    planned = {n: spec for n, spec in assignment.specs.items() if assignment.refs[n].block >= 0 or n in plan.matrices}
    mixed = plan.apply(planned, assignment.refs, source.fingerprint)
    for name, spec in mixed.items():
        if assignment.refs[name].block < 0:
            if len(set(spec.widths)) > 1:
                raise InputError(f"the plan gives the groups of {name} several widths; a table has one.")
            mixed[name] = replace(spec, bits=spec.widths[0], widths=())
    return replace(assignment, specs={name: mixed.get(name, spec) for name, spec in assignment.specs.items()})


def planned_widths(
    source: SourceModel,
    job: Job,
    assignment: Assignment,
    journal: Journal,
    batches: Sequence[Tensor],
    options: RunOptions,
) -> tuple[Assignment, BitPlan | None]:
    """The widths that are known before the first block: those of a given plan, or of a budget.

    Args:
        source, job, assignment, batches, options: of the run.
        journal: open; a plan that had to be made is kept in it.

    Returns:
        the assignment with widths, and the plan; the assignment as it was and None where blocks find their own.

    Raises:
        InputError: a plan that does not fit, or a budget that cannot be met.
    """
    plan = job.plan
    if job.searches == "budget":
        facts = journal.facts(PLAN)
        if facts is None:
            options.progress(Event("stage", blocks=source.map.n_blocks, message="surveying the float model"))
            made = plan_by_budget(source, job, assignment, batches, options, journal.folder / SURVEY)
            journal.put(PLAN, Entry({}, made.to_dict()))
            facts = journal.facts(PLAN)
        assert facts is not None
        # From the journal in either case, so that a run and its continuation have the same numbers.
        plan = parse_plan(facts, "the journal's plan")
    if plan is None:
        return assignment, None
    planned = with_plan(source, assignment, plan)
    return planned, _told_anew(plan, planned)


def _told_anew(plan: BitPlan, assignment: Assignment) -> BitPlan:
    """The plan, without what its summary says if that is of other widths: somebody has edited it."""
    refs = {name: assignment.refs[name] for name in plan.matrices}
    stored = 8 * sum(stored_size(ref, assignment.specs[name]) for name, ref in refs.items())
    bits = stored / sum(ref.shape[0] * ref.shape[1] for ref in refs.values())
    known = plan.summary.get("bits_per_weight")
    unchanged = isinstance(known, float) and abs(known - bits) < 1e-9
    return plan if unchanged else replace(plan, summary={"bits_per_weight": bits})


def plan_of_run(
    source: SourceModel, job: Job, assignment: Assignment, facts: Mapping[str, Mapping[str, Any]]
) -> BitPlan | None:
    """The plan that a run's blocks have found, from what the journal says of them; None if they did not look."""
    if job.allocation is None:
        return None
    matrices, layouts = {}, {}
    for part in facts.values():
        for name, found in part.get("allocation", {}).items():
            spec, ref = assignment.specs[name], assignment.refs[name]
            size = spec.columns_per_group(ref.shape[1])
            matrices[name] = MatrixPlan(
                ref.shape, size, spec.rotation, tuple(found["widths"]), found["why"], tuple(found["channels"])
            )
        layouts.update(part["layouts"])
    if not matrices:
        return None
    sizes = stored_bytes({name: layouts[name] for name in matrices})
    weights = sum(plan.shape[0] * plan.shape[1] for plan in matrices.values())
    stored = 8 * sum(sizes.values()) / weights
    settings = {**asdict(job.allocation.search), "sequences": job.allocation.sequences}
    return BitPlan(source.fingerprint, job.allocation.policy, matrices, settings, {"bits_per_weight": stored})

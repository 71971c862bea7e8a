"""Finding the widths of groups without keeping the model that comes of it (L5)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bitfloor.core.bit_plan import BitPlan, read_plan
from bitfloor.core.errors import InputError
from bitfloor.formats.atomic import atomic_file, storage_error
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.budget import check_budget, plan_by_budget
from bitfloor.pipeline.folder import PLAN_FILE
from bitfloor.pipeline.job import Job, assign
from bitfloor.pipeline.quantize import Text, quantize_model
from bitfloor.pipeline.run import RunOptions


def make_bit_plan(source: SourceModel, job: Job, batches: Sequence[Tensor], out: Path, options: RunOptions) -> BitPlan:
    """Write a bit plan.

    A budget needs a survey of the float model. SBA looks at each block with those before it quantized, so the whole
    run has to be made; it is made in a folder beside the plan, which is removed.

    Args:
        source: the float model.
        job: with an allocation.
        batches: calibration tokens.
        out: the file to be written.
        options: how to carry it out.

    Raises:
        InputError: the recipe allocates nothing, or replays a plan; a budget that cannot be met; no place for the file.
        BitfloorError: the run failed.
    """
    if job.allocation is None:
        raise InputError(
            "the recipe gives every group the same width, so there is nothing to allocate; "
            "add allocation.policy=sba or allocation.policy=budget."
        )
    if job.plan is not None:
        raise InputError("the recipe replays a plan (allocation.plan); leave it out to make one.")
    if job.recipe.get("restore"):
        raise InputError(
            "the recipe restores the model before it finds the widths that count, so they fit that model alone, which "
            "only a whole run makes; leave the stage out with restore=null."
        )
    if out.is_dir():
        raise InputError(f"{out} is a folder; give a file for the plan.")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} for the plan; make it first.")
    assignment = assign(source.map, job)
    check_budget(job, assignment)
    source.check_finite()
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise storage_error(error, out.parent) from error
    try:
        if job.allocation.policy == "budget":
            plan = plan_by_budget(source, job, assignment, batches, options, scratch / "survey")
        else:
            # Widths are found before anything is tuned.
            untuned = replace(job, recipe={**job.recipe, "tune": None})
            quantize_model(source, untuned, Text(batches), scratch, options=options)
            plan = read_plan(scratch / PLAN_FILE)
        with atomic_file(out) as file:
            file.write(plan.to_json().encode())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return plan

"""A float model made of a quantized one: quantize, restore, write it as an ordinary folder, open that as a source."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.heap import trim_heap
from bitfloor.formats.atomic import atomic_file, make_folder, read_json, storage_error
from bitfloor.formats.files import DTYPE_NAMES
from bitfloor.formats.shards import CheckpointWriter
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.allocate import planned_widths
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.folder import copy_companions
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.journal import MERGED, RESTORED, Entry, Journal
from bitfloor.pipeline.lessons import Lessons, RestoreConfig, Targets, find_targets
from bitfloor.pipeline.restore import Restoring
from bitfloor.pipeline.run import Run, RunOptions


def restored_source(
    source: SourceModel,
    job: Job,
    assignment: Assignment,
    journal: Journal,
    batches: Sequence[Tensor],
    lessons: Lessons,
    options: RunOptions,
) -> SourceModel:
    """The restored model as the source of a second quantization, made as far as the journal lacks it.

    Args:
        source: the float model.
        job: of the whole run.
        assignment: the storage of every matrix.
        journal: open.
        batches: calibration tokens.
        lessons: what the adapters learn from.
        options: how to carry it out.

    Raises:
        InputError: what was asked cannot be done.
        BitfloorError: the run failed; the journal keeps what was finished.
    """
    folder = journal.folder / RESTORED
    facts = journal.facts(MERGED)
    if facts is not None:
        found = _reopened(source, folder, facts["model"])
        if found is not None:
            return found
    _tell(source, options, "the first quantization")
    # Scales and norms are tuned at the very end; what is quantized here is quantized again.
    first = replace(job, recipe={**job.recipe, "tune": None, "restore": None})
    planned, _ = planned_widths(source, first, assignment, journal.first, batches, options)
    Run(source, first, planned, journal.first, batches, options).execute()
    targets = find_targets(RestoreConfig(**job.recipe["restore"]), assignment)
    student, learnt = Restoring(source, job, assignment, journal, lessons, options).merged(targets)
    _tell(source, options, "restoring: writing the restored model")
    _write(source, student, assignment, targets, folder)
    del student
    trim_heap()
    restored = source.again(folder)
    journal.put(MERGED, Entry({}, _told(job, lessons, targets, learnt) | {"model": restored.fingerprint}))
    _tell(source, options, "the second quantization")
    return restored


def _reopened(source: SourceModel, folder: Path, fingerprint: str) -> SourceModel | None:
    """The folder as it was written, None if it is not."""
    try:
        found = source.again(folder)
        return found if found.fingerprint == fingerprint else None
    except (InputError, BitfloorError):
        return None


def _told(job: Job, lessons: Lessons, targets: Targets, learnt: dict[str, Any]) -> dict[str, Any]:
    """What the report says of the stage."""
    config = RestoreConfig(**job.recipe["restore"])
    read = learnt["done"] * config.batch_size * config.accumulation
    return {
        "objective": config.objective,
        "adapter": config.adapter,
        "adapted": len(targets.refs),
        "left": dict(Counter(targets.left.values())),
        "tokens": read * config.seqlen,
        "distinct_tokens": min(read, config.distinct) * config.seqlen,
        "held_out_tokens": lessons.held.numel(),
        "passes": config.passes,
        "updates": learnt["done"],
        **{key: learnt[key] for key in ("before", "after", "step", "note")},
    }


def _write(source: SourceModel, student: SourceModel, assignment: Assignment, targets: Targets, folder: Path) -> None:
    """Write the restored model: what was quantized or adapted from memory, all else as the source has it.

    Names are those of the model's parameters, types those of the source.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise storage_error(error, folder) from error
    writer = CheckpointWriter(make_folder(folder))
    types = {target: info.dtype for info in source.tensors.values() for target in info.targets}
    changed = {assignment.refs[name].param for name in assignment.specs if assignment.refs[name].block >= 0}
    changed |= {ref.param for ref in targets.refs}
    ends = (source.map.embedding, None if source.map.tied else source.map.head)
    outer = [ref.param for ref in ends if ref is not None]
    state = student.skeleton.state_dict()
    names = [*source.map.kept, *outer, *dict.fromkeys(ref.param for ref in source.map.matrices)]
    for name in names:
        make = _cast(student, name, types[name]) if name in changed else _read(source, name)
        writer.add_later(name, DTYPE_NAMES[types[name]], tuple(state[name].shape), make)
    writer.write()
    copy_companions(source.path, folder)
    for code in sorted(source.path.glob("*.py")):  # of models that bring their own
        with atomic_file(folder / code.name) as target:
            target.write(code.read_bytes())
    writer.finish(read_json(source.path / "config.json"))


def _cast(student: SourceModel, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def make() -> Tensor:
        found: Tensor = student.skeleton.get_parameter(name).detach().to(dtype).cpu().contiguous()
        if not bool(found.isfinite().all()):
            raise BitfloorError(f"{name} is not finite after restoring; use a smaller restore.rate.")
        return found

    return make


def _read(source: SourceModel, name: str) -> Callable[[], Tensor]:
    return lambda: source.read(name)


def _tell(source: SourceModel, options: RunOptions, message: str) -> None:
    options.progress(Event("stage", blocks=source.map.n_blocks, message=message))

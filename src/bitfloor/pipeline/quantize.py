"""A quantization from end to end: check, open the journal, make what is missing, write the checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.core.precision import products_used
from bitfloor.data.tokenize import token_sha256
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.allocate import planned_widths, with_plan
from bitfloor.pipeline.budget import check_budget
from bitfloor.pipeline.finish import write_checkpoint
from bitfloor.pipeline.folder import clear_finished, damaged_file, only_writer, own_spill, prepare
from bitfloor.pipeline.job import Job, assign
from bitfloor.pipeline.journal import Journal, differences
from bitfloor.pipeline.lessons import Lessons
from bitfloor.pipeline.restored import restored_source
from bitfloor.pipeline.run import Run, RunOptions
from bitfloor.pipeline.tune import Tuning, reads_text


@dataclass(frozen=True)
class Text:
    """The tokens that a run reads.

    Args:
        batches: those that calibrate, int64 ``[B, T]``; empty when nothing reads them.
        lessons: those that adapters learn from, where the model is restored.
    """

    batches: Sequence[Tensor] = ()
    lessons: Lessons | None = None

    def sha256(self) -> str:
        """Hash of what calibrates."""
        return token_sha256(self.batches) if self.batches else "none"


def quantize_model(
    source: SourceModel,
    job: Job,
    text: Text,
    out: Path,
    *,
    options: RunOptions,
    resume: bool = True,
) -> dict[str, Any]:
    """Quantize ``source`` into the folder ``out``.

    Args:
        source: the float model.
        job: what to do.
        text: what is read.
        out: output folder: new, empty, or of an earlier run of the same command.
        options: how to carry it out.
        resume: continue an unfinished run, and keep a finished checkpoint of the same command; False starts over.

    Returns:
        The report of the checkpoint.

    Raises:
        InputError: wrong input, found before anything was written, or a folder of a different run.
        BitfloorError: the run failed; what was finished is kept.
    """
    assignment = assign(source.map, job)
    check_budget(job, assignment)
    if job.plan is not None:
        with_plan(source, assignment, job.plan)  # does it fit?
    fingerprint = make_fingerprint(source, job, text.sha256(), options.device, text.lessons)
    if not Journal(out, fingerprint).exists():
        source.check_finite()
    finished = prepare(out, resume=resume)
    journal = Journal(out, fingerprint)
    if finished is not None:
        changed = differences(finished.get("made_from", {}), fingerprint)
        if changed:
            raise InputError(
                f"{out} holds a finished checkpoint that was made differently: {changed}. "
                "Choose another folder, or add --no-resume to replace it."
            )
        damaged = damaged_file(out, finished)
        if damaged is not None:
            raise InputError(f"{out / damaged} is not as it was written; copy it again, or add --no-resume.")
        if journal.folder.exists():  # killed after config.json was written and before the journal was removed
            journal.close()
        return finished
    with only_writer(out), own_spill(options.spill, out) as spill:
        journal.begin(resume)
        clear_finished(out)
        running, batches, model = replace(options, spill=spill), text.batches, source
        if text.lessons is not None:
            model = restored_source(source, job, assignment, journal, batches, text.lessons, running)
        # A plan that was given is one for the model that was given.
        of = source if job.plan is not None else model
        assignment, known = planned_widths(of, job, assignment, journal, batches, running)
        Run(model, job, assignment, journal, batches, running).execute()
        if job.recipe.get("tune"):
            Tuning(model, job, assignment, journal, batches, running).execute()
        return write_checkpoint(model, job, assignment, journal, out, known)


def make_fingerprint(
    source: SourceModel, job: Job, data: str, device: str, lessons: Lessons | None = None
) -> dict[str, Any]:
    """Everything that decides the bytes of the result; ``data`` is the hash of the calibration tokens."""
    kind = torch.device(device).type
    multiplied = reads_text(job) or lessons is not None
    return {
        "recipe": job.recipe_sha256,
        "model": source.fingerprint,
        "calibration_tokens": data,
        "products": products_used(job.products, device) if multiplied else "none",
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "bitfloor": version("bitfloor"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **({} if lessons is None else {"restoration_tokens": lessons.sha256(), "peft": version("peft")}),
    }

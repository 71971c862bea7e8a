"""The four functions bitfloor is: quantize, load, evaluate, export; and what the command line adds to them.

Each checks its input first and raises :class:`bitfloor.core.errors.InputError` before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.bit_plan import BitPlan
from bitfloor.core.errors import InputError
from bitfloor.data.sources import load_text
from bitfloor.data.tokenize import calibration_batches
from bitfloor.environment import environment as environment
from bitfloor.modeling.context import context_length
from bitfloor.modeling.loader import SourceModel, open_source
from bitfloor.ops import native
from bitfloor.ops.choice import check_device
from bitfloor.pipeline.allocator import steady_allocation
from bitfloor.pipeline.events import Progress, silent
from bitfloor.pipeline.export import export_dense
from bitfloor.pipeline.job import Job
from bitfloor.pipeline.lessons import make_lessons, restore_config
from bitfloor.pipeline.migrate import migrate_checkpoint
from bitfloor.pipeline.plan import check_memory, make_plan
from bitfloor.pipeline.quantize import Text, quantize_model
from bitfloor.pipeline.run import RunOptions
from bitfloor.pipeline.tune import reads_text
from bitfloor.recipe.job import make_job
from bitfloor.recipe.load import load_recipe
from bitfloor.recipe.schema import Recipe
from bitfloor.runtime.hf import load_packed
from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.text_model import TextModel
from bitfloor.talking import Compute, continue_text, open_text_model

AnyPath = str | os.PathLike[str]
AnyRecipe = AnyPath | Mapping[str, Any]

PACK = {"documents": False, "packed": True, "auto": None}  # one running text, or documents; None: as the text is


def quantize(
    model: AnyPath,
    out: AnyPath,
    recipe: AnyRecipe = "gptq-w4g64",
    *,
    overrides: Sequence[str] = (),
    calibration: str | None = None,
    device: str = "cpu",
    resume: bool = True,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    spill: AnyPath | None = None,
) -> dict[str, Any]:
    """Quantize a model into a folder that ``load``, ``AutoModelForCausalLM`` and ``bitfloor generate`` read.

    Args:
        model: local folder, hub id, or ``.gguf`` file.
        out: output folder: new, empty, or of the same command, which then continues where it was interrupted.
        recipe: name of a preset, path of a YAML file, or the same content as a mapping.
        overrides: ``"path.to.key=value"``; ``bits=`` and ``group_size=`` mean those of ``spec``.
        calibration: text spec that replaces the recipe's.
        device: ``"cpu"`` or ``"cuda"``.
        resume: False discards an unfinished or finished run in ``out`` and starts over.
        progress: called with every :class:`bitfloor.pipeline.events.Event`.
        trust_remote_code: allow Python code that comes with the model.
        spill: folder for the activations of the calibration text; None holds them in memory.

    Returns:
        The report, also stored as ``bitfloor.json``.

    Raises:
        InputError: anything wrong with what was asked.
        BitfloorError: the run failed; calling again continues it.
    """
    check_device(device)
    checked = load_recipe(recipe, overrides, calibration=calibration)
    if torch.is_inference_mode_enabled():
        raise InputError("quantize cannot run under torch.inference_mode(): call it outside, or under torch.no_grad().")
    steady_allocation()  # before the first large tensor: a heap that has grown is used for the later ones too
    native.loaded()  # refuses a setting that it does not know before anything is written
    source = open_source(model, trust_remote_code=trust_remote_code)
    job = make_job(checked, source, device)
    check_calibration(checked, job, source, calibration)
    planned = make_plan(source, job, _plan_data(checked, job), device=device, spill=spill is not None)
    check_memory(planned, whole=stages_of_all_blocks(checked))
    text = read_texts(checked, job, source)
    options = RunOptions(device, None if spill is None else Path(spill), progress or silent)
    return quantize_model(source, job, text, Path(out), options=options, resume=resume)


def allocate(
    model: AnyPath,
    out: AnyPath,
    recipe: AnyRecipe = "slim-llm-w2g64",
    *,
    overrides: Sequence[str] = (),
    calibration: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BitPlan:
    """Find the widths that :func:`quantize` would, and write them to a file that ``allocation.plan`` takes.

    Args:
        model, recipe, overrides, calibration, device, progress: as for :func:`quantize`.
        out: the file to be written, JSON (docs/allocation.md).

    Raises:
        InputError: anything wrong with what was asked; a recipe that allocates nothing.
        BitfloorError: the run failed.
    """
    from bitfloor.planning import make_bit_plan

    check_device(device)
    checked = load_recipe(recipe, overrides, calibration=calibration)
    if torch.is_inference_mode_enabled():
        raise InputError("allocate cannot run under torch.inference_mode(): call it outside, or under torch.no_grad().")
    steady_allocation()
    native.loaded()
    source = open_source(model)
    job = make_job(checked, source, device)
    check_calibration(checked, job, source, calibration)
    check_memory(make_plan(source, job, _plan_data(checked, job), device=device, spill=False))
    batches = _batches(checked, job, source)
    return make_bit_plan(source, job, batches, Path(out), RunOptions(device, None, progress or silent))


def plan(
    model: AnyPath,
    recipe: AnyRecipe = "gptq-w4g64",
    *,
    overrides: Sequence[str] = (),
    calibration: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    spill: bool = False,
) -> dict[str, Any]:
    """What :func:`quantize` would make and need, without loading a weight.

    Returns:
        Matrices with their storage, expected bytes and bits, peak and available memory.

    Raises:
        InputError: wrong input, or a run that cannot fit in memory.
    """
    check_device(device)
    checked = load_recipe(recipe, overrides, calibration=calibration)
    source = open_source(model, trust_remote_code=trust_remote_code)
    job = make_job(checked, source, device)
    check_calibration(checked, job, source, calibration)
    planned = make_plan(source, job, _plan_data(checked, job), device=device, spill=spill)
    result = {"model": _short(model), "recipe": checked.name, **planned}
    check_memory(planned, whole=stages_of_all_blocks(checked))
    return result


def load(folder: AnyPath, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A quantized model as an ordinary transformers model whose linears compute from packed weights.

    Args:
        folder: made by :func:`quantize`.
        device: where to put it.
        dtype: of activations and kept tensors; None takes the one in ``config.json``.

    Raises:
        InputError: not a bitfloor checkpoint, or a damaged one.
    """
    check_device(device)
    return load_packed(folder, device=device, dtype=dtype or "auto")


def evaluate(
    model: AnyPath,
    *,
    perplexity: Sequence[str] = ("default",),
    windows: int | None = 20,
    seqlen: int = 2048,
    baseline: AnyPath | None = None,
    device: str = "cpu",
    divergence: bool = False,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Perplexity on one or several texts, and the paired difference to a baseline.

    Args:
        model: packed or float: folder, hub id, or ``.gguf`` file.
        perplexity: text specs.
        windows: windows a text, from its start; None takes all.
        seqlen: tokens in a window.
        baseline: the model to compare with, usually the float one; scored on the same tokens.
        device: ``"cpu"`` or ``"cuda"``.
        divergence: also the KL divergence from the baseline and the share of equal top tokens (needs both in memory).
        progress: called with events.
        trust_remote_code: allow Python code that comes with the models.

    Returns:
        ``{"model", "perplexity": [{"text", "value", "windows", "seqlen", "tokens", "vs_baseline"}]}``; with
        ``divergence`` each text also has ``"divergence": {"kl", "top1_agreement"}``.

    Raises:
        InputError: wrong input.
    """
    from bitfloor.scoring import Scoring, score

    check_device(device)
    scoring = Scoring(tuple(perplexity), windows, seqlen, device, divergence, trust_remote_code)
    return score(model, baseline, scoring, progress or silent)


def export(folder: AnyPath, out: AnyPath, *, format: str = "dense") -> dict[str, Any]:
    """Write a quantized model in a form that other software loads. Needs no calibration.

    Args:
        folder: made by :func:`quantize`.
        out: a new or empty folder.
        format: ``"dense"``: an ordinary float Hugging Face folder with the dequantized weights, for any tool that
            reads safetensors (as large as the original).

    Returns:
        ``{"format", "path", "bytes", "tensors"}``.

    Raises:
        InputError: not a bitfloor checkpoint, unknown format, or an output folder that holds something.
    """
    if format != "dense":
        raise InputError(f"export format {format!r} is unknown; this version writes: dense.")
    return export_dense(Path(folder), Path(out))


def migrate(folder: AnyPath, out: AnyPath | None = None) -> dict[str, Any]:
    """Write a quantized model of an older format version in the present one: the same tensors.

    Args:
        folder: made by an earlier :func:`quantize`.
        out: a new or empty folder; None rewrites ``folder`` itself, file by file, so that a killed run loses nothing.

    Returns:
        ``{"from", "to", "path", "files"}``.

    Raises:
        InputError: not a bitfloor checkpoint, a damaged one, one that needs no migration, or ``out`` holds something.
    """
    return migrate_checkpoint(Path(folder), None if out is None else Path(out))


def generate(
    folder: AnyPath,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    device: str = "cpu",
    chat: bool = False,
    trust_remote_code: bool = False,
    backend: str = "auto",
    activations: str | None = None,
) -> str:
    """Continue a prompt greedily with a packed model, or with a float one for comparison.

    Args:
        folder: a bitfloor checkpoint; a float folder, hub id or ``.gguf`` file is read too.
        prompt: the text to continue.
        max_new_tokens: at most so many.
        device: ``"cpu"`` or ``"cuda"``.
        chat: wrap the prompt as a user message by the model's chat template.
        trust_remote_code: allow Python code that comes with the model.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        activations: ``"float"`` or ``"int8"``; None as ``BITFLOOR_BACKEND`` says, float by default.

    Returns:
        The new text only.

    Raises:
        InputError: not a bitfloor checkpoint, a prompt longer than the model's context, or a backend that is not there.
    """
    check_device(device)
    compute = Compute(device, backend, activations, trust_remote_code)
    return continue_text(folder, prompt, Settings(max_new_tokens=max_new_tokens), compute, chat=chat).text


def text_model(
    folder: AnyPath,
    *,
    device: str = "cpu",
    backend: str = "auto",
    activations: str | None = None,
    context: int | None = None,
    trust_remote_code: bool = False,
) -> TextModel:
    """A model that makes text piece by piece, and remembers the last one: what ``chat`` and ``serve`` talk to.

    Args:
        folder, device, backend, activations, trust_remote_code: as for :func:`generate`.
        context: most tokens, prompt and text together; None for what the model was made for.

    Raises:
        InputError: nothing usable there, or a backend that is not there.
    """
    check_device(device)
    return open_text_model(folder, Compute(device, backend, activations, trust_remote_code), context=context)


def _plan_data(recipe: Recipe, job: Job) -> tuple[int, int, int] | None:
    """``(sequences, seqlen, batch size)`` of the calibration, None when the method reads none."""
    if not reads_text(job):
        return None
    part = recipe.calibration
    return part.sequences, part.seqlen, part.batch_size


def _batches(recipe: Recipe, job: Job, source: SourceModel) -> list[Tensor]:
    if not reads_text(job):
        return []
    part = recipe.calibration
    return calibration_batches(
        source.tokenizer(),
        load_text(part.text, "calibration"),
        sequences=part.sequences,
        seqlen=part.seqlen,
        batch_size=part.batch_size,
        min_chars=part.min_chars,
        pack=PACK[part.mode],
    )


def stages_of_all_blocks(recipe: Recipe) -> list[str]:
    """Keys of the recipe's stages that hold all blocks at once."""
    return [key for key in ("restore", "tune") if getattr(recipe, key) is not None]


def read_texts(recipe: Recipe, job: Job, source: SourceModel) -> Text:
    """All tokens that a run reads.

    Raises:
        InputError: a text that cannot be read, or is too short.
    """
    batches = _batches(recipe, job, source)
    config = restore_config(job)
    if config is None:
        return Text(batches)
    part = recipe.calibration
    read = load_text(config.text or part.text, "calibration")
    pack = PACK[config.mode or part.mode]
    return Text(batches, make_lessons(config, source.tokenizer(), read, batches, min_chars=part.min_chars, pack=pack))


def check_calibration(recipe: Recipe, job: Job, source: SourceModel, calibration: str | None) -> None:
    """Refuse a calibration text that would be ignored, and sequences that the model cannot read.

    Raises:
        InputError: the method reads no text, or the sequences are longer than the model's context.
    """
    reads = reads_text(job)
    part = recipe.calibration
    if recipe.tune is not None and part.sequences <= part.batch_size:
        raise InputError(
            f"calibration.sequences = {part.sequences} make one batch of calibration.batch_size = {part.batch_size}, "
            "and tuning judges on a batch that it does not learn from; use more sequences, or a smaller batch."
        )
    longest = context_length(source)
    if reads and longest is not None and recipe.calibration.seqlen > longest:
        raise InputError(
            f"calibration.seqlen = {recipe.calibration.seqlen:,} is longer than this model's context of "
            f"{longest:,} tokens; use at most that."
        )
    if recipe.restore is not None and longest is not None and recipe.restore.seqlen > longest:
        raise InputError(
            f"restore.seqlen = {recipe.restore.seqlen:,} is longer than this model's context of "
            f"{longest:,} tokens; use at most that."
        )
    if calibration is not None and not reads and (recipe.restore is None or recipe.restore.text is not None):
        why = "needs none" if recipe.restore is None else "calibrates on none, and restore.text is another"
        raise InputError(f"the calibration text {calibration!r} would not be read: {recipe.name} {why}; leave it out.")


def _short(model: AnyPath) -> str:
    text = os.fspath(model)
    return Path(text).name if Path(text).exists() else text

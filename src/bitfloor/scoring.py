"""Scoring one model, or one against another: the part of the API that joins texts, models and statistics (L6)."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.data.sources import load_text
from bitfloor.data.tokenize import evaluation_windows
from bitfloor.evaluation.divergence import divergence
from bitfloor.evaluation.paired import PairedResult, paired_difference
from bitfloor.evaluation.perplexity import PerplexityResult, perplexity
from bitfloor.pipeline.events import Event, Progress
from bitfloor.runtime.load import check_model, load_model, load_tokenizer

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Scoring:
    """What to score on; see :func:`bitfloor.api.evaluate`."""

    texts: tuple[str, ...]
    windows: int | None
    seqlen: int
    device: str
    divergence: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class Scores:
    """Perplexity by text and, for a packed model against its float one, the divergence by text."""

    perplexities: list[PerplexityResult]
    divergences: list[dict[str, float]] | None = None


def score(model: AnyPath, baseline: AnyPath | None, scoring: Scoring, progress: Progress) -> dict[str, Any]:
    """Score ``model``, and ``baseline`` on the same tokens when there is one.

    Raises:
        InputError: wrong input; nothing has been loaded then.
    """
    if not scoring.texts:
        raise InputError("there is no text to score on; give at least one, or leave the default.")
    if scoring.divergence and baseline is None:
        raise InputError("the divergence is measured from a float model; name it as the baseline.")
    for name in (model, baseline):
        if name is not None:
            check_model(name, trust_remote_code=scoring.trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code=scoring.trust_remote_code)
    sources = [load_text(text, "evaluation") for text in scoring.texts]
    cut = [evaluation_windows(tokenizer, s, windows=scoring.windows, seqlen=scoring.seqlen) for s in sources]
    own: list[PerplexityResult]
    other: list[PerplexityResult | None] = [None] * len(cut)
    divergences: list[dict[str, float] | None] = [None] * len(cut)
    if scoring.divergence and baseline is not None:
        own, others, found = _both(model, baseline, cut, scoring, progress)
        other, divergences = list(others), list(found)
    else:
        own = _one(model, cut, scoring, progress)
        if baseline is not None:
            other = list(_one(baseline, cut, scoring, progress))
    entries = []
    for source, result, reference, measured in zip(sources, own, other, divergences, strict=True):
        entry = {
            "text": source.name,
            "value": result.value,
            "windows": result.windows,
            "seqlen": result.seqlen,
            "tokens": result.tokens,
            "vs_baseline": None if reference is None else _versus(paired_difference(result, reference)),
        }
        entries.append(entry if measured is None else {**entry, "divergence": measured})
    return {"model": _short(model), "perplexity": entries}


def _versus(found: PairedResult) -> dict[str, Any]:
    return {"delta_nll": found.delta_nll, "ci95": None if found.ci95 is None else list(found.ci95)}


def _watch(name: str, progress: Progress) -> Any:
    began = time.perf_counter()

    def tell(done: int, total: int) -> None:
        seconds = time.perf_counter() - began
        eta = seconds / done * (total - done) if done else None
        progress(Event("window", block=done - 1, blocks=total, seconds=seconds, eta=eta, message=name))

    return tell


def _one(model: AnyPath, cut: list[Tensor], scoring: Scoring, progress: Progress) -> list[PerplexityResult]:
    loaded = load_model(model, device=scoring.device, trust_remote_code=scoring.trust_remote_code)
    tell = _watch(_short(model), progress)
    results = [perplexity(loaded, windows, device=scoring.device, progress=tell) for windows in cut]
    del loaded
    gc.collect()  # two models never need to be in memory at once
    return results


def _both(
    model: AnyPath, baseline: AnyPath, cut: list[Tensor], scoring: Scoring, progress: Progress
) -> tuple[list[PerplexityResult], list[PerplexityResult], list[dict[str, float]]]:
    exact = load_model(baseline, device=scoring.device, trust_remote_code=scoring.trust_remote_code)
    packed = load_model(model, device=scoring.device, trust_remote_code=scoring.trust_remote_code)
    tell = _watch(_short(model), progress)
    found = [divergence(exact, packed, windows, device=scoring.device, progress=tell) for windows in cut]
    return (
        [f.quantized_model for f in found],
        [f.float_model for f in found],
        [{"kl": f.kl, "top1_agreement": f.top1_agreement} for f in found],
    )


def _short(model: AnyPath) -> str:
    text = os.fspath(model)
    return Path(text).name if Path(text).exists() else text

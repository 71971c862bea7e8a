"""Perplexity by the field's convention: non-overlapping windows, the first token of each unscored.

``perplexity = exp(mean over windows of the mean negative log-likelihood of tokens 2..T given the tokens before)``.
All windows have the same length, so the mean over windows is the mean over tokens. The windows come from
``data.tokenize.evaluation_windows``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.data.tokenize import token_sha256
from bitfloor.evaluation.limits import check_windows

CHUNK = 256
"""Positions whose logits are held in float32 at once: 50 MB with a vocabulary of 49,152, 268 MB with 262,144."""

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True)
class PerplexityResult:
    """What one model scores on one text.

    Args:
        value: the perplexity; infinite when the mean loss is too large for ``exp``.
        nll_per_window: mean negative log-likelihood of each window's scored tokens, in nats.
        tokens: tokens scored, ``windows * (seqlen - 1)``.
        windows: how many.
        seqlen: tokens in a window.
        token_sha256: hash of the windows; two results are comparable only when theirs are equal.
    """

    value: float
    nll_per_window: tuple[float, ...]
    tokens: int
    windows: int
    seqlen: int
    token_sha256: str


def perplexity(
    model: Any,
    windows: Tensor,
    *,
    device: torch.device | str = "cpu",
    batch: int = 1,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score ``windows`` with ``model``.

    Args:
        model: a causal language model of transformers, already on ``device``.
        windows: int64 ``[W, T]``.
        device: where the model is.
        batch: windows in one forward pass. Memory grows by ``batch * T * vocabulary`` logits in the model's dtype.
        progress: see ``Progress``.

    Raises:
        InputError: windows the model cannot read.
        BitfloorError: the model gives logits that are not finite.
    """
    check_windows(model, windows)
    if batch < 1:
        raise InputError(f"batch = {batch} is no number of windows; use at least 1.")
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(device)
            logits = forward_logits(model, ids)
            for row, row_logits in zip(ids, logits, strict=True):
                losses.append(_window_nll(row_logits, row, len(losses)))
                if progress is not None:
                    progress(len(losses), len(windows))
            del logits
    finally:
        model.train(was_training)
    return make_result(losses, windows)


def make_result(losses: list[float], windows: Tensor) -> PerplexityResult:
    """Wrap per-window losses (mean nats per scored token) of ``windows [W, T]``."""
    count, seqlen = windows.shape
    mean = math.fsum(losses) / len(losses)
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return PerplexityResult(value, tuple(losses), count * (seqlen - 1), count, seqlen, token_sha256(windows))


def forward_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of token ids ``[B, T]``, in the model's dtype, by one untouched forward pass."""
    with torch.no_grad():  # not inference mode: a model may keep tensors it makes on the way (rotary tables)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def check_finite(log_probs: Tensor, window: int) -> None:
    """Refuse log-probabilities ``[N, V]`` with NaN: one NaN or +Inf logit makes its whole row NaN, so one column tells.

    Raises:
        BitfloorError: naming the window.
    """
    if torch.isnan(log_probs[:, 0]).any():
        raise BitfloorError(
            f"The model gives NaN or infinite logits in window {window}; its weights are damaged, or its dtype "
            "overflows (try float32)."
        )


def _window_nll(logits: Tensor, ids: Tensor, window: int) -> float:
    """Mean loss of one window. ``logits [T, V]`` in any dtype, ``ids [T]``; softmax in float32, sum in float64."""
    total = 0.0
    targets = ids[1:]
    for start in range(0, len(targets), CHUNK):
        stop = min(start + CHUNK, len(targets))
        log_probs = torch.log_softmax(logits[start:stop].float(), dim=-1)
        check_finite(log_probs, window)
        picked = log_probs.gather(-1, targets[start:stop, None])
        total -= float(picked.sum(dtype=torch.float64))
    return total / len(targets)

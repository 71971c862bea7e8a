"""How far a quantized model's predictions are from its float model's, token by token.

Perplexity asks whether the text became less likely; divergence asks whether the model became another model, and sees
changes that cancel out in the loss. Both models run on one window at a time; no logits are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.evaluation.limits import check_windows
from bitfloor.evaluation.perplexity import (
    CHUNK,
    PerplexityResult,
    Progress,
    check_finite,
    forward_logits,
    make_result,
)


@dataclass(frozen=True)
class DivergenceResult:
    """Comparison of a quantized model with its float model over the same windows.

    Args:
        kl: mean over scored tokens of ``KL(float || quantized)``, in nats.
        top1_agreement: share of scored positions at which both models rank the same token first, in [0, 1].
        kl_per_window: means by window, for error bars.
        top1_per_window: likewise.
        float_model: perplexity of the float model, from the same forward passes.
        quantized_model: perplexity of the quantized model.
    """

    kl: float
    top1_agreement: float
    kl_per_window: tuple[float, ...]
    top1_per_window: tuple[float, ...]
    float_model: PerplexityResult
    quantized_model: PerplexityResult


@dataclass
class _Sums:
    kl: float = 0.0
    agreed: int = 0
    float_nll: float = 0.0
    quantized_nll: float = 0.0


def divergence(
    float_model: Any,
    quantized_model: Any,
    windows: Tensor,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> DivergenceResult:
    """Run both models over ``windows`` and compare them at every position that predicts a token of the window.

    Args:
        float_model: the reference, a causal language model of transformers on ``device``.
        quantized_model: the model compared with it, likewise.
        windows: int64 ``[W, T]``.
        device: where both models are.
        progress: called with (windows done, windows in all).

    Raises:
        InputError: windows one of the models cannot read, or models with different vocabularies.
        BitfloorError: logits that are not finite.
    """
    check_windows(float_model, windows)
    check_windows(quantized_model, windows)
    training = float_model.training, quantized_model.training
    float_model.eval()
    quantized_model.eval()
    sums: list[_Sums] = []
    try:
        for row in windows:
            ids = row.to(device)
            reference = forward_logits(float_model, ids[None])[0]
            candidate = forward_logits(quantized_model, ids[None])[0]
            sums.append(_compare(reference, candidate, ids, len(sums)))
            if progress is not None:
                progress(len(sums), len(windows))
    finally:
        float_model.train(training[0])
        quantized_model.train(training[1])
    scored = windows.shape[1] - 1
    kl = [s.kl / scored for s in sums]
    agreement = [s.agreed / scored for s in sums]
    return DivergenceResult(
        kl=math.fsum(kl) / len(kl),
        top1_agreement=math.fsum(agreement) / len(agreement),
        kl_per_window=tuple(kl),
        top1_per_window=tuple(agreement),
        float_model=make_result([s.float_nll / scored for s in sums], windows),
        quantized_model=make_result([s.quantized_nll / scored for s in sums], windows),
    )


def _compare(reference: Tensor, candidate: Tensor, ids: Tensor, window: int) -> _Sums:
    """Sums over one window. Logits ``[T, V]`` in any dtype, ``ids [T]``.

    A good 4-bit model diverges by some 1e-2 nats a token, a difference of log-probabilities of the order 10: half
    precision has steps of 4e-3 to 6e-2 there, so the difference would drown. Hence float32 softmax and float64 sums.
    """
    if reference.shape != candidate.shape:
        raise InputError(
            f"The models have vocabularies of {reference.shape[-1]} and {candidate.shape[-1]} tokens and cannot be "
            "compared; give the float model this one was made from."
        )
    sums = _Sums()
    targets = ids[1:]
    for start in range(0, len(targets), CHUNK):
        stop = min(start + CHUNK, len(targets))
        log_p = torch.log_softmax(reference[start:stop].float(), dim=-1)
        log_q = torch.log_softmax(candidate[start:stop].float(), dim=-1)
        check_finite(log_p, window)
        check_finite(log_q, window)
        chosen = targets[start:stop, None]
        sums.float_nll -= float(log_p.gather(-1, chosen).sum(dtype=torch.float64))
        sums.quantized_nll -= float(log_q.gather(-1, chosen).sum(dtype=torch.float64))
        sums.agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        # kl_div(log_q, log_p) is sum of p * (log p - log q), with 0 where p is 0 (a masked token: -inf - -inf).
        terms = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
        terms = torch.where(log_p.isneginf(), 0.0, terms)
        sums.kl += float(terms.sum(dtype=torch.float64))
    return sums

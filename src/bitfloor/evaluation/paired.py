"""Is one model worse than another on a text, or is it noise? The paired difference of log-loss with a 95% interval.

Two models score the same windows, so the difficulty of the text cancels in the difference. Windows, not tokens, are the
unit of the interval: tokens of one window share a context and an article, so their differences are correlated, and an
interval that counts them as independent is too narrow. docs/evaluation.md has the reasoning and tests/unit/evaluation
the simulation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.evaluation.perplexity import PerplexityResult

MARGIN = 0.01
"""Nats a token. "Not worse", everywhere in this project: the 95% interval of the difference lies below this."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedResult:
    """Difference in log-loss of a candidate to a baseline, over the same windows.

    Args:
        delta_nll: mean of candidate minus baseline, nats a token; positive means the candidate is worse.
            ``exp(delta_nll)`` is the ratio of the perplexities.
        ci95: lower and upper end of the 95% interval, or None when there is none.
        windows: how many windows it rests on.
        reason: why there is no interval, or None.
    """

    delta_nll: float
    ci95: tuple[float, float] | None
    windows: int
    reason: str | None = None


def paired_difference(candidate: PerplexityResult, baseline: PerplexityResult) -> PairedResult:
    """Compare two results on the same tokens.

    Equation:
        ``mean(d) ± t(0.975, W - 1) * sd(d) / sqrt(W)`` with ``d_w`` the difference of the two mean losses of window w.

    Raises:
        InputError: the two were not scored on the same windows.
        BitfloorError: a loss that is not finite.
    """
    if candidate.token_sha256 != baseline.token_sha256:
        raise InputError(
            f"The two results are not of the same tokens ({candidate.windows} x {candidate.seqlen} with hash "
            f"{candidate.token_sha256[:12]} and {baseline.windows} x {baseline.seqlen} with hash "
            f"{baseline.token_sha256[:12]}); score both models on one text with one tokenizer."
        )
    pairs = zip(candidate.nll_per_window, baseline.nll_per_window, strict=True)
    return mean_with_interval([a - b for a, b in pairs])


def mean_with_interval(differences: list[float]) -> PairedResult:
    """Student's t interval for the mean of per-window differences.

    Args:
        differences: one number a window, in nats a token; at least one.

    Raises:
        InputError: an empty list.
        BitfloorError: a number that is not finite.
    """
    count = len(differences)
    if count == 0:
        raise InputError("There are no windows to compare; score at least two.")
    if not all(math.isfinite(d) for d in differences):
        raise BitfloorError("A window's loss is not finite, so the models cannot be compared; one of them is damaged.")
    mean = math.fsum(differences) / count
    if count == 1:
        return PairedResult(mean, None, 1, "one window has no spread to judge the difference by; score at least two")
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    half = t_quantile(0.5 + CONFIDENCE / 2, count - 1) * math.sqrt(variance / count)
    return PairedResult(mean, (mean - half, mean + half), count)


def not_worse(result: PairedResult, margin: float = MARGIN) -> bool:
    """Whether the candidate is shown to be not worse: the whole interval lies below ``margin``. Without an interval
    nothing is shown."""
    return result.ci95 is not None and result.ci95[1] < margin


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution for a whole number of degrees of freedom.

    The distribution function is a finite sum then (Abramowitz and Stegun, 26.7.3 and 26.7.4), in the angle
    ``theta = atan(t / sqrt(degrees))``; it grows with the angle, so bisection finds its inverse to the last digits.

    Args:
        probability: in (0, 1).
        degrees: at least 1.
    """
    assert 0.0 < probability < 1.0 and degrees >= 1
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(80):  # halves an interval of 3.2 until it is below the spacing of floats
        middle = (low + high) / 2
        if 0.5 + _central_mass(middle, degrees) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_mass(theta: float, degrees: int) -> float:
    """Mass between -t and t, with the sign of ``theta``."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return (2 / math.pi) * (theta + sine * total) if odd else sine * total

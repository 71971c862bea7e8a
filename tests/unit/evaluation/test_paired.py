import math
import random

import pytest
import torch

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.evaluation.paired import PairedResult, mean_with_interval, not_worse, paired_difference, t_quantile
from bitfloor.evaluation.perplexity import make_result

# Two-sided 95% points (0.975 quantiles) as printed in statistical tables.
TABLE_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
TABLE_975 |= {12: 2.179, 15: 2.131, 19: 2.093, 20: 2.086, 25: 2.060, 29: 2.045, 40: 2.021, 60: 2.000, 120: 1.980}
TABLE_995 = {1: 63.657, 2: 9.925, 5: 4.032, 10: 3.169, 30: 2.750, 120: 2.617}


@pytest.mark.parametrize(("probability", "table"), [(0.975, TABLE_975), (0.995, TABLE_995)])
def test_t_quantile_against_tables(probability: float, table: dict[int, float]) -> None:
    for degrees, value in table.items():
        assert t_quantile(probability, degrees) == pytest.approx(value, abs=0.00051), degrees  # half a printed digit


def test_t_quantile_closed_forms_and_limit() -> None:
    for p in (0.6, 0.9, 0.975, 0.999):
        # Bisection ends within a few units of float spacing of the angle; the tangent magnifies that at most 1e3 times.
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-10)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-10)
        assert t_quantile(1 - p, 7) == pytest.approx(-t_quantile(p, 7), rel=1e-10)
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-12)
    # With 5,000 degrees the distance to the normal quantile 1.959964 is (z^3 + z) / (4 * 5000) = 4.7e-4.
    assert t_quantile(0.975, 5000) == pytest.approx(1.959964 + 4.75e-4, abs=1e-5)


def result(losses: list[float], seed: int = 0, seqlen: int = 8):
    tokens = torch.randint(0, 50, (len(losses), seqlen), generator=torch.Generator().manual_seed(seed))
    return make_result(losses, tokens)


def test_interval_by_hand() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, t(0.975, 2) = 4.3027.
    paired = paired_difference(result([3.1, 2.2, 4.3]), result([3.0, 2.0, 4.0]))
    assert paired.delta_nll == pytest.approx(0.2)
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert paired.ci95 == pytest.approx((0.2 - half, 0.2 + half), abs=1e-5)
    assert (paired.windows, paired.reason) == (3, None)


def test_the_text_s_difficulty_cancels() -> None:
    # Windows from easy to hard, the candidate worse by 0.02 in each: noise of the text would drown that unpaired.
    baseline = [1.0, 5.0, 2.0, 4.0, 3.0]
    candidate = [b + 0.02 + noise for b, noise in zip(baseline, [1e-3, -1e-3, 0, 1e-3, -1e-3], strict=True)]
    low, high = paired_difference(result(candidate), result(baseline)).ci95
    assert 0.015 < low < 0.02 < high < 0.025


def test_swapping_the_models_mirrors_the_interval() -> None:
    a, b = result([3.1, 2.2, 4.3]), result([3.0, 2.5, 4.0])
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert backward.delta_nll == pytest.approx(-forward.delta_nll)
    assert backward.ci95 == pytest.approx((-forward.ci95[1], -forward.ci95[0]))


def test_ratio_of_perplexities() -> None:
    a, b = result([3.1, 2.2, 4.3]), result([3.0, 2.5, 4.0])
    assert math.exp(paired_difference(a, b).delta_nll) == pytest.approx(a.value / b.value)


def test_a_model_against_itself() -> None:
    paired = paired_difference(result([3.0, 2.0]), result([3.0, 2.0]))
    assert paired == PairedResult(0.0, (0.0, 0.0), 2)
    assert not_worse(paired)


def test_one_window_has_no_interval() -> None:
    paired = paired_difference(result([3.0]), result([3.5]))
    assert paired.delta_nll == -0.5
    assert paired.ci95 is None
    assert "at least two" in paired.reason
    assert not not_worse(paired)


def test_not_worse_looks_at_the_upper_end() -> None:
    assert not_worse(PairedResult(0.005, (0.001, 0.0099), 9))
    assert not not_worse(PairedResult(0.005, (0.001, 0.01), 9))
    assert not not_worse(PairedResult(-0.5, (-1.1, 0.1), 2))  # better on average, but nothing is shown
    assert not_worse(PairedResult(0.005, (0.001, 0.0099), 9), margin=0.05)
    assert not not_worse(PairedResult(0.005, (0.001, 0.0099), 9), margin=0.0)


def test_other_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="not of the same tokens"):
        paired_difference(result([3.0, 2.0], seed=0), result([3.0, 2.0], seed=1))
    with pytest.raises(InputError, match=r"2 x 8 .* 1 x 8"):
        paired_difference(result([3.0, 2.0]), result([3.0]))


def test_numbers_that_are_not_finite() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(BitfloorError, match="not finite"):
            paired_difference(result([3.0, bad]), result([3.0, 2.0]))
    with pytest.raises(InputError):
        mean_with_interval([])


def test_coverage_with_clustered_noise() -> None:
    """Differences of tokens share a part within their window. The interval over windows covers the truth 95% of the
    time; one that takes the tokens as independent does not, which is why it is not offered."""
    trials, windows, tokens, truth = 4000, 8, 64, 0.02
    rng = random.Random(0)
    covered = naive_covered = 0
    for _ in range(trials):
        means, spread = [], 0.0
        for _ in range(windows):
            # The mean and the sum of squares of 64 token differences with unit noise around a shared shift of 0.3.
            shift = truth + rng.gauss(0.0, 0.3)
            noise = rng.gauss(0.0, 1.0 / math.sqrt(tokens))
            means.append(shift + noise)
            spread += 2.0 * rng.gammavariate((tokens - 1) / 2, 1.0)
        low, high = mean_with_interval(means).ci95
        covered += low <= truth <= high
        centre = sum(means) / windows
        variance = (spread + tokens * sum((m - centre) ** 2 for m in means)) / (windows * tokens - 1)
        naive_covered += abs(centre - truth) <= 1.965 * math.sqrt(variance / (windows * tokens))
    # The standard error of a share of 0.95 in 4,000 trials is 0.0034; four of them are allowed.
    assert covered / trials == pytest.approx(0.95, abs=0.014)
    assert naive_covered / trials < 0.75

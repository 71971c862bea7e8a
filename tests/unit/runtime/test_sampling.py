"""Which token comes next."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.runtime.sampling import LIKELY, Sampler, Settings

DRAWS = 1500


def shares(logits: torch.Tensor, **settings: Any) -> dict[int, float]:
    sampler = Sampler(Settings(**settings))
    counts = Counter(sampler.choose(logits) for _ in range(DRAWS))
    return {token: count / DRAWS for token, count in counts.items()}


def test_greedy_takes_the_first_of_the_highest() -> None:
    assert Sampler(Settings()).choose(torch.tensor([0.0, 3.0, 3.0, -math.inf])) == 1


def test_draws_follow_the_distribution_at_a_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -math.inf])
    found = shares(logits, temperature=2.0)
    expected = torch.softmax(logits / 2.0, 0).tolist()
    assert set(found) == {0, 1, 2}
    # Four standard deviations of a share of 1500 draws: 4 * sqrt(0.25 / 1500) = 0.052.
    assert all(abs(found[token] - expected[token]) < 0.052 for token in found)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.05, 0.35]))
    assert set(shares(logits, temperature=1.0, top_p=0.49)) == {1}
    assert set(shares(logits, temperature=1.0, top_p=0.51)) == {1, 3}
    found = shares(logits, temperature=1.0, top_p=0.9)
    assert set(found) == {0, 1, 3}  # 0.85 is not enough
    assert abs(found[1] - 0.5 / 0.95) < 0.052  # what is kept is drawn by its share of what is kept


def test_top_p_over_more_tokens_than_are_sorted_first() -> None:
    flat = torch.zeros(4 * LIKELY)
    assert len(shares(flat, temperature=1.0, top_p=0.75)) > 2 * LIKELY


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([5.0, 5.001, -2.0])
    for temperature in (1e-6, 1e-300, 5e-324):
        assert set(shares(logits, temperature=temperature)) == {1}


def test_a_seed_repeats_and_the_global_state_is_left_alone() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = [
        [s.choose(logits) for _ in range(20)] for s in (Sampler(Settings(temperature=1.0, seed=i)) for i in (1, 1, 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail(bad: float, temperature: float) -> None:
    logits = torch.tensor([1.0, bad, -math.inf])
    with pytest.raises(BitfloorError, match="NaN or infinite"):
        Sampler(Settings(temperature=temperature)).choose(logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": math.nan}, "top_p = nan"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1 << 63}, "seed = 9223372036854775808"),
        ({"stop": ("a", "")}, "empty stop string"),
    ],
)
def test_numbers_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**values)

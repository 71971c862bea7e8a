import math

import pytest
import torch

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.evaluation.divergence import _compare, divergence
from bitfloor.evaluation.perplexity import perplexity


def reference(p_model, q_model, windows: torch.Tensor) -> tuple[list[float], list[float]]:
    """Plain float64, position by position, from the definition."""
    kl, agree = [], []
    for window in windows:
        with torch.no_grad():
            p = p_model(window[None]).logits[0].double().softmax(-1)
            q = q_model(window[None]).logits[0].double().softmax(-1)
        rows = range(len(window) - 1)
        kl.append(sum(float((p[t] * (p[t] / q[t]).log()).sum()) for t in rows) / len(rows))
        agree.append(sum(int(p[t].argmax() == q[t].argmax()) for t in rows) / len(rows))
    return kl, agree


def test_equals_the_definition_in_float64(llama, windows) -> None:
    result = divergence(llama(1), llama(2), windows)
    kl, agree = reference(llama(1), llama(2), windows)
    # float32 log-probabilities of order 10 carry errors of 1e-6.
    assert result.kl_per_window == pytest.approx(kl, rel=1e-5)
    assert result.top1_per_window == pytest.approx(agree)
    assert result.kl == pytest.approx(sum(kl) / 5, rel=1e-5)
    assert result.top1_agreement == pytest.approx(sum(agree) / 5)
    assert result.kl > 0.1 and result.top1_agreement < 0.9  # the two models do differ


def test_direction_is_float_first(llama, windows) -> None:
    forward = divergence(llama(1), llama(2), windows).kl
    backward = divergence(llama(2), llama(1), windows).kl
    assert forward != pytest.approx(backward, rel=1e-3)
    assert forward == pytest.approx(sum(reference(llama(1), llama(2), windows)[0]) / 5, rel=1e-5)


def test_a_model_does_not_diverge_from_itself(llama, windows) -> None:
    result = divergence(llama(1), llama(1), windows)
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0


def test_perplexities_come_with_it(llama, windows) -> None:
    seen: list[tuple[int, int]] = []
    result = divergence(llama(1), llama(2), windows, progress=lambda done, total: seen.append((done, total)))
    assert result.float_model == perplexity(llama(1), windows)
    assert result.quantized_model == perplexity(llama(2), windows)
    assert seen[-1] == (5, 5)


def test_small_divergence_survives_half_precision_logits() -> None:
    # Two bfloat16 models whose logits differ in one place by one step. In half precision p * (log p - log q) is a
    # multiple of bfloat16 steps of log p near 10, so its sum is off by more than its size.
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3, 1000, generator=generator).bfloat16()
    q = p.clone()
    q[:, 5] += 0.0625
    p64, q64 = p.double().log_softmax(-1), q.double().log_softmax(-1)
    expected = float((p64.exp() * (p64 - q64))[:-1].sum())
    sums = _compare(p, q, torch.tensor([0, 1, 2]), 0)
    # 1,000 terms, each p of about 1e-3 times a float32 error of 5e-7 in log p: 5e-7 at worst.
    assert sums.kl == pytest.approx(expected, abs=1e-6)
    half = p.log_softmax(-1), q.log_softmax(-1)
    assert abs(float((half[0].exp() * (half[0] - half[1]))[:-1].sum()) - expected) > 1e-5


def test_masked_tokens_cost_nothing_where_both_mask_them() -> None:
    p = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, -math.inf]])
    q = torch.tensor([[0.5, 1.0, -math.inf], [0.5, 1.0, 0.0]])
    sums = _compare(p, q, torch.tensor([0, 1]), 0)
    p64, q64 = p[0, :2].double().log_softmax(-1), q[0, :2].double().log_softmax(-1)
    assert sums.kl == pytest.approx(float((p64.exp() * (p64 - q64)).sum()), rel=1e-5)
    assert math.isfinite(_compare(p, q.flip(0), torch.tensor([0, 1]), 0).kl)


def test_other_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="vocabularies of 3 and 4"):
        _compare(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1]), 0)


def test_damaged_model_fails_the_run(llama, windows) -> None:
    damaged = llama(2)
    with torch.no_grad():
        damaged.model.norm.weight[0] = float("nan")
    with pytest.raises(BitfloorError, match="NaN"):
        divergence(llama(1), damaged, windows)

import math

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.data.tokenize import token_sha256
from bitfloor.evaluation import perplexity as module
from bitfloor.evaluation.perplexity import make_result, perplexity


def naive_nll(model, windows: torch.Tensor) -> list[float]:
    """One token at a time in float64, from prefixes: no shift, no chunk, no batch to get wrong."""
    model = model.double()
    means = []
    for window in windows:
        losses = []
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :position]).logits[0, -1]
            losses.append(-float(logits[window[position]] - torch.logsumexp(logits, 0)))
        means.append(sum(losses) / len(losses))
    return means


def test_equals_a_naive_recomputation(llama, windows) -> None:
    result = perplexity(llama(1), windows)
    expected = naive_nll(llama(1), windows)
    # A float32 forward of two small layers against a float64 one: relative errors of some 1e-6 on losses below 20.
    assert result.nll_per_window == pytest.approx(expected, abs=1e-4)
    assert result.value == pytest.approx(math.exp(sum(expected) / 5), rel=1e-4)
    assert (result.tokens, result.windows, result.seqlen) == (55, 5, 12)
    assert result.token_sha256 == token_sha256(windows)


def test_equals_the_loss_of_transformers(llama, windows) -> None:
    model = llama(1)
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.item() for w in windows]
    # Same logits; both reduce 11 terms of order 10 in float32 or better.
    assert perplexity(model, windows).nll_per_window == pytest.approx(losses, rel=1e-6)


def test_first_token_is_context_only() -> None:
    class Copycat(torch.nn.Module):
        """Certain that the next token repeats the one before."""

        config = type("Config", (), {"vocab_size": 8, "max_position_embeddings": None})()

        def forward(self, input_ids, use_cache):
            return type("Out", (), {"logits": 1000.0 * torch.nn.functional.one_hot(input_ids, 8).half()})()

    # No model could know the first token of a window; with it unscored this text is perfectly predicted.
    assert perplexity(Copycat(), torch.tensor([[3, 3, 3], [5, 5, 5]])).value == 1.0


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_chunks_cover_every_position_once(llama, windows, monkeypatch, chunk: int) -> None:
    whole = perplexity(llama(1), windows)
    monkeypatch.setattr(module, "CHUNK", chunk)
    # Only the order of a float64 sum of 11 float32 numbers changes.
    assert perplexity(llama(1), windows).nll_per_window == pytest.approx(whole.nll_per_window, rel=1e-12)


def test_batches_change_nothing_and_progress_counts_windows(llama, windows) -> None:
    seen: list[tuple[int, int]] = []
    single = perplexity(llama(1), windows, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]
    # Matrix products of another shape may sum in another order: float32 rounding.
    assert perplexity(llama(1), windows, batch=2).nll_per_window == pytest.approx(single.nll_per_window, rel=1e-5)


def test_softcapped_logits_are_the_model_s_own() -> None:
    # Gemma 2 caps its logits after the head: scoring must go through the model's forward, not through head and hidden.
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        max_position_embeddings=16,
    )
    model = Gemma2ForCausalLM(config).eval()
    windows = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    # Logits lie in (-2, 2), so no loss can exceed log(32) + 4.
    assert max(perplexity(model, windows).nll_per_window) < math.log(32) + 4
    assert perplexity(model, windows).nll_per_window == pytest.approx(naive_nll(model, windows), abs=1e-4)


def test_half_precision_logits_are_scored_in_float32(llama, windows) -> None:
    model = llama(1).bfloat16()
    with torch.no_grad():
        logits = torch.cat([model(w[None]).logits for w in windows]).double()
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")
    # bfloat16 has steps of 0.06 at 10; float32 arithmetic on the same logits is good to 1e-6.
    assert perplexity(model, windows).nll_per_window == pytest.approx(losses.mean(1).tolist(), rel=1e-5)


def test_training_mode_is_left_as_found(llama, windows) -> None:
    for mode in (True, False):
        model = llama(1).train(mode)
        perplexity(model, windows)
        assert model.training is mode


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_fail_the_run(llama, windows, bad: float) -> None:
    model = llama(1)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = bad
    with pytest.raises(BitfloorError, match="window 0") as caught:
        perplexity(model, windows)
    assert caught.value.exit_code == 1


def test_an_impossible_text_is_infinitely_perplexing(windows) -> None:
    assert make_result([1000.0] * 5, windows).value == math.inf


def test_a_batch_below_one_is_refused(llama, windows) -> None:
    with pytest.raises(InputError, match="batch = 0"):
        perplexity(llama(1), windows, batch=0)

"""A head rounded towards its logits: what it sees, that it pays, tied or not, resumed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_learned_rounding import hashes
from transformers import AutoModelForCausalLM

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.modeling.loader import open_source
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.head import TOKENS_A_CHANNEL, enough, shown_to_head

Recipe = dict[str, Any]


def with_head(recipe: Recipe, bits: int, rounding: str = "gptq", **parts: Any) -> Recipe:
    return {**recipe, "embedding": {"bits": bits, "group_size": 32}, "head": {"rounding": rounding}, **parts}


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "opt", "gemma2", "mixtral"])
def test_the_sums_are_of_what_reaches_the_head(name: str, pico: Any) -> None:
    folder = pico(name)
    tokens = [torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    shown = shown_to_head(open_source(folder), tokens, torch.float32, "cpu")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for batch in tokens:
            model(batch)
    expected = torch.cat([x.flatten(0, 1) for x in seen]).double()
    assert shown.rows == len(expected) == 3 * 48
    torch.testing.assert_close(shown.hessian.double(), expected.T @ expected, rtol=1e-3, atol=1e-3)


def test_no_more_text_is_read_than_is_needed(pico: Any) -> None:
    source = open_source(pico("llama"))
    batches = [torch.zeros(4, 64, dtype=torch.int64)] * 5
    assert TOKENS_A_CHANNEL * 48 == 768
    assert len(enough(source, batches)) == 3
    assert len(enough(source, batches[:2])) == 2


def divergence(folder: Path, model: Path, tokens: torch.Tensor) -> float:
    """KL from the float model's distribution, nats a token."""
    with torch.no_grad():
        found = api.load(folder, dtype=torch.float32)(tokens).logits.log_softmax(-1)
        exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits.log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def unseen(texts: Any) -> torch.Tensor:
    from trained import byte_tokenizer

    ids = byte_tokenizer()(Path(texts.evaluation).read_text("utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: 16 * 128]).view(16, 128)


@pytest.mark.parametrize("bits", [3, 4])
def test_it_pays_on_text_that_was_not_seen(
    bits: int, trained: Path, recipe: Callable[..., Recipe], texts: Any, tmp_path: Path
) -> None:
    """The blocks stay in float, so the table is all that differs; it is the embedding as well."""
    keep = {"layers": [{"match": "*", "keep": True}]}
    losses, sizes = {}, {}
    for rounding in ("nearest", "gptq"):
        out = tmp_path / rounding
        report = api.quantize(trained, out, with_head(recipe("rtn", 4), bits, rounding, **keep))
        losses[rounding] = divergence(out, trained, unseen(texts))
        sizes[rounding] = report["bits_per_parameter"]
    assert losses["gptq"] < 0.85 * losses["nearest"]
    assert sizes["gptq"] == sizes["nearest"]


def test_a_head_of_its_own_leaves_the_embedding_alone(pico: Any, small: Recipe, tmp_path: Path) -> None:
    nearest = api.quantize(pico("llama"), tmp_path / "nearest", with_head(small, 3, "nearest"))
    found = api.quantize(pico("llama"), tmp_path / "gptq", with_head(small, 3))
    embedding = "model.embed_tokens"
    assert found["matrices"][embedding]["output_error"] == nearest["matrices"][embedding]["output_error"]
    # Nearest is nearest: in the weights themselves nothing is closer.
    assert found["matrices"]["lm_head"]["output_error"] > nearest["matrices"]["lm_head"]["output_error"]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(pico: Any, small: Recipe, tmp_path: Path) -> None:
    budget = {"policy": "budget", "tables": [3, 4, 8], "sort": True}
    recipe = with_head(small, 4, allocation=budget)
    api.quantize(pico("llama_tied"), tmp_path / "whole", recipe)

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(pico("llama_tied"), tmp_path / "out", recipe, progress=stop)
    api.quantize(pico("llama_tied"), tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    replay = with_head(small, 4, allocation={"plan": str(tmp_path / "whole" / "plan.json")})
    api.quantize(pico("llama_tied"), tmp_path / "replay", replay)
    weights = {n: h for n, h in hashes(tmp_path / "whole").items() if n.endswith(".safetensors")}
    assert {n: h for n, h in hashes(tmp_path / "replay").items() if n.endswith(".safetensors")} == weights


def test_too_little_text_is_said(pico: Any, small: Recipe, tmp_path: Path) -> None:
    recipe = with_head(small, 4, method={"name": "rtn", "range": "minmax"})
    recipe["calibration"] = {**small["calibration"], "sequences": 1, "seqlen": 4}
    report = api.quantize(pico("llama_tied"), tmp_path / "out", recipe)
    note = report["matrices"]["model.embed_tokens"]["note"]
    assert "saw 4 calibration tokens" in note and "rounded to nearest instead" in note


def test_a_head_that_is_not_quantized_is_refused(pico: Any, small: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"head\.rounding = gptq needs a quantized head, and its bits are 16"):
        api.quantize(pico("llama"), tmp_path / "out", with_head(small, 16))
    with pytest.raises(InputError, match=r"head\.rounding = \"up\" is not allowed; use nearest or gptq"):
        api.quantize(pico("llama"), tmp_path / "out", with_head(small, 4, "up"))
    assert not (tmp_path / "out").exists()

"""What the native step refuses: input that makes no sense, and models that it does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_cases import TIGHT, eager, need_kernels, off, packed
from pico import VOCAB, pico_model
from torch import nn
from transformers import AttentionInterface

from bitfloor.core.errors import InputError
from bitfloor.ops.backend import reference
from bitfloor.runtime.native_step import NativeDecoder, why_not


@pytest.fixture(autouse=True)
def kernels() -> None:
    need_kernels()


def test_bad_input_gets_a_sentence_and_changes_nothing(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama")
    decoder = NativeDecoder(model, 8)
    assert decoder.context == 8
    decoder.prefill([1, 2, 3])
    for ids, message in (
        ([], "no tokens"),
        ([1] * 6, "6 more tokens do not fit: the context holds 8 and has 3"),
        ([4, VOCAB], f"Token id {VOCAB} is outside"),
        ([-1], "Token id -1 is outside"),
    ):
        with pytest.raises(InputError, match=message):
            decoder.prefill(ids)
    with pytest.raises(InputError, match="The first 4 of 3"):
        decoder.truncate(4)
    with pytest.raises(InputError, match="The first -1 of 3"):
        decoder.truncate(-1)
    assert decoder.length == 3
    wanted = eager(model, [1, 2, 3, 4, 5, 6, 7, 8])
    assert off(decoder.prefill([4, 5, 6, 7, 8]), wanted) < TIGHT
    with pytest.raises(InputError, match="1 more tokens do not fit"):
        decoder.step(1)
    for length in (0, 1 << 40):
        with pytest.raises(InputError, match="cannot be held"):
            NativeDecoder(model, length)
    assert why_not(model, 1 << 20) is None
    assert "at most" in (why_not(model, 1 << 40) or "")


def other_attention(model: Any) -> None:
    AttentionInterface.register("nothing", lambda *given, **_: (given[1].transpose(1, 2) * 0, None))
    model.set_attn_implementation("nothing")


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def around(model: Any) -> None:
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj)


def other_norm(model: Any) -> None:
    model.model.norm = nn.RMSNorm(48)


def other_epsilon(model: Any) -> None:
    model.model.layers[2].post_attention_layernorm.variance_epsilon = 1e-3


def more_in_a_layer(model: Any) -> None:
    model.model.layers[0].adapter = nn.Linear(2, 2)


def double(model: Any) -> None:
    model.model.norm.double()
    model.model.layers[0].mlp.up_proj.bias = None
    model.lm_head = nn.Linear(48, VOCAB, bias=False, dtype=torch.float64)


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Any], None] | None]] = {
    "gemma2": ("Gemma2ForCausalLM", {}, None),
    "phi3": ("Phi3ForCausalLM", {}, None),
    "gelu": ("activation is gelu", {"hidden_act": "gelu"}, None),
    "dynamic": (
        "'dynamic'",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        None,
    ),
    "attention": ("computed by 'nothing'", {}, other_attention),
    "hooked": ("hooks into a LlamaMLP", {}, hooked),
    "around": ("Sequential", {}, around),
    "other norm": ("RMSNorm stands where", {}, other_norm),
    "other epsilon": ("one epsilon", {}, other_epsilon),
    "more": ("adapter", {}, more_in_a_layer),
    "double": ("float64", {}, double),
    "float": ("none of its layers is packed", {}, None),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_not_known_is_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    reason, changes, change = REFUSED[case]
    kind = case if case in ("gemma2", "phi3") else "llama"
    model = pico_model(kind, **changes) if case == "float" else packed(tmp_path / "m", kind, **changes)
    if change:
        change(model)
    assert reason in (why_not(model) or "")
    with pytest.raises(InputError, match="cannot run this model"):
        NativeDecoder(model, 8)


def test_the_reference_has_no_native_step(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama")
    with reference():
        assert why_not(model) == "the reference was asked for"
    assert why_not(model) is None
    assert "meta" in (why_not(model.to("meta")) or "")

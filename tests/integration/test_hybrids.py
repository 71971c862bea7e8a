"""Models that mix attention with convolutions and recurrences, or hold experts in places of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import HYBRIDS, pico_config
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from bitfloor import api
from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.modeling.discover import describe
from bitfloor.modeling.skeleton import build_skeleton
from bitfloor.runtime.linear import cache_weights

IDS = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(HYBRIDS))
def test_what_is_packed_is_what_runs_and_what_is_exported(
    name: str, pico: Callable[..., Path], recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = api.quantize(pico(name), tmp_path / "out", recipe("gptq", 3))
    assert report["bytes"] == api.plan(pico(name), recipe("gptq", 3))["bytes"]
    packed = api.load(tmp_path / "out")
    cache_weights(packed)
    api.export(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = (model(input_ids=IDS, use_cache=False).logits for model in (packed, dense))
    assert bool(found.isfinite().all())
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert len(api.generate(tmp_path / "out", "Once", max_new_tokens=4)) > 0


@pytest.mark.parametrize(
    ("name", "part", "reason"),
    [
        ("qwen3_next", "linear_attn.conv1d.weight", "depthwise convolution"),
        ("qwen3_next", "mlp.shared_expert_gate.weight", "router"),
        ("falcon_h1", "mamba.conv1d.weight", "depthwise convolution"),
        ("mamba", "mixer.A_log", "state-space parameter"),
        ("mamba", "mixer.dt_proj.weight", "state-space parameter"),
        ("jamba", "mamba.A_log", "state-space parameter"),
        ("lfm2", "conv.conv.weight", "depthwise convolution"),
        ("jetmoe", "mlp.router.layer.weight", "router"),
    ],
)
def test_what_stays_as_it_is_has_a_reason(name: str, part: str, reason: str) -> None:
    parts = describe(build_skeleton(pico_config(name)))
    assert {parts.reasons[kept] for kept in parts.kept if kept.endswith(part)} == {reason}


def test_a_convolution_that_mixes_channels_is_refused() -> None:
    model = build_skeleton(pico_config("lfm2"))
    model.model.layers[0].conv.conv.groups = 1
    with pytest.raises(InputError, match=r"layers.0.conv.conv.weight has shape .* belongs to Conv1d"):
        describe(model)


def test_a_weight_that_is_read_is_kept_as_the_refusal_says(
    pico: Callable[..., Path], recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(x @ self.gate_proj.weight.t()) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(BitfloorError, match=r"reads the weight of \S*gate_proj itself") as refused:
        api.quantize(pico("llama"), tmp_path / "out", recipe("gptq", 3))
    rule = re.search(r"the rule (\{.*\}) under layers", str(refused.value))
    assert rule is not None
    api.quantize(
        pico("llama"), tmp_path / "out", recipe("gptq", 3), overrides=[f"layers=[{rule.group(1)}]"], resume=False
    )
    assert bool(api.load(tmp_path / "out")(input_ids=IDS, use_cache=False).logits.isfinite().all())

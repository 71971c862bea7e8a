"""Centred levels from the recipe to the loaded model: bytes as planned, replayed, resumed, tuned, and what refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_learned_rounding import hashes
from transformers import AutoModelForCausalLM

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.pipeline.events import Event
from bitfloor.recipe.load import load_recipe

IDS = torch.tensor([[1, 5, 9, 20, 31]])
LEARNT = {"name": "bitfloor", "steps": 3, "optimizer": "adamw"}
BUDGET = {"policy": "budget", "average": 2.2, "sequences": 3, "widths": [1, 2, 3]}


def centred(small: dict[str, Any], method: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**small, "method": method, "spec": {"bits": 2, "group_size": 16, "rotation": 16, "centred": 2}, **parts}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", [{"name": "gptq", "sweeps": 1}, LEARNT, {"name": "rtn"}], ids=lambda m: m["name"])
def test_what_is_planned_is_stored_and_loads(
    name: str, method: dict[str, Any], pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = centred(small, method)
    report = api.quantize(pico(name), tmp_path / "out", recipe)
    assert api.plan(pico(name), recipe)["bytes"] == report["bytes"]
    plain = api.plan(pico(name), {**recipe, "spec": {**recipe["spec"], "centred": 0}})
    assert report["bits_per_linear_weight"] < plain["bits_per_linear_weight"] - 0.05
    api.export(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        found = api.load(tmp_path / "out", dtype=torch.float32)(IDS).logits
        torch.testing.assert_close(found, dense(IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_mixed_plan_replays_and_a_stopped_run_goes_on(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    recipe = centred(small, LEARNT, allocation=BUDGET, tune={"steps": 2})
    report = api.quantize(pico("llama"), tmp_path / "whole", recipe)
    promised = api.plan(pico("llama"), recipe)["bits_per_linear_weight"]
    assert promised - 0.1 < report["bits_per_linear_weight"] <= promised

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(pico("llama"), tmp_path / "out", recipe, progress=stop)
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    replay = {**recipe, "allocation": {"plan": str(tmp_path / "whole" / "plan.json")}}
    api.quantize(pico("llama"), tmp_path / "replay", replay)
    whole, again = hashes(tmp_path / "whole"), hashes(tmp_path / "replay")
    assert {n: h for n, h in again.items() if n.endswith("safetensors")} == {
        n: h for n, h in whole.items() if n.endswith("safetensors")
    }


def test_a_rule_may_say_otherwise_and_older_recipes_keep_their_hash(pico: Any, small: dict[str, Any]) -> None:
    recipe = load_recipe(centred(small, LEARNT, layers=[{"match": "*.down_proj", "centred": 0}]))
    assert recipe.decide("model.layers.0.mlp.down_proj").spec.centred == 0
    assert recipe.decide("model.layers.0.mlp.up_proj").spec.centred == 2
    assert "centred" not in load_recipe(small).content()["spec"]
    assert recipe.content()["layers"][0]["centred"] == 0


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ({"name": "signround", "steps": 2}, "the method signround finds ranges its own way"),
        ({"name": "omniquant", "steps": 2}, "the method omniquant finds ranges its own way"),
        ({"name": "gptq", "range": "sqc"}, "gptq with method.range = sqc finds ranges its own way"),
    ],
    ids=lambda part: part["name"] if isinstance(part, dict) else "",
)
def test_methods_with_ranges_of_their_own_refuse(
    method: dict[str, Any], what: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=what):
        api.quantize(pico("llama"), tmp_path / "out", centred(small, method))
    with pytest.raises(InputError, match=r"spec.centred = 7 is not allowed; use 0 \(none\), or the widest groups"):
        recipe = centred(small, LEARNT)
        recipe["spec"]["centred"] = 7
        api.quantize(pico("llama"), tmp_path / "out", recipe)
    with pytest.raises(InputError, match="cannot be symmetric and centred"):
        recipe["spec"] |= {"centred": 2, "symmetric": True}
        api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()

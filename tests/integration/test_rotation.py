"""Rotated storage from the recipe to the loaded model: every kind of matrix, resuming, tuning, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_learned_rounding import hashes
from transformers import AutoModelForCausalLM

from bitfloor import api
from bitfloor.core.errors import BitfloorError
from bitfloor.methods.rtn import Rtn
from bitfloor.pipeline.events import Event

CHOOSING = {"name": "bitfloor", "steps": 3, "optimizer": "adamw", "zero_share": 50.0, "choose": True}
IDS = torch.tensor([[1, 5, 9, 20, 31]])


def rotated(small: dict[str, Any], method: dict[str, Any], **spec: Any) -> dict[str, Any]:
    recipe = {**small, "method": method, "spec": {"bits": 4, "group_size": 16, "rotation": 16, **spec}}
    recipe["calibration"] = {**small["calibration"], "batch_size": 1}
    return recipe


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = api.load(folder, dtype=torch.float32)(IDS).logits
    return found


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2", "llama4_text"])
@pytest.mark.parametrize("method", [{"name": "gptq"}, CHOOSING, {"name": "rtn"}], ids=lambda method: method["name"])
def test_what_runs_is_what_is_exported(
    name: str, method: dict[str, Any], pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    api.quantize(pico(name), tmp_path / "out", rotated(small, method))
    api.export(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), dense(IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    recipe = rotated(small, CHOOSING, bits=3)
    recipe |= {"tune": {"steps": 4, "head": True}, "head": {"bits": 4, "group_size": 32}}
    report = api.quantize(pico("llama"), tmp_path / "whole", recipe)
    assert any(matrix.get("chosen") for matrix in report["matrices"].values())

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(pico("llama"), tmp_path / "out", recipe, progress=stop)
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_rule_may_leave_a_matrix_as_it_lies(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    recipe = rotated(small, {"name": "rtn"})
    recipe["layers"] = [{"match": "*.down_proj", "rotation": 0}]
    plan = api.plan(pico("llama"), recipe)
    wanted = {matrix["name"]: matrix["rotation"] for matrix in plan["matrices"]}
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    for name, module in api.load(tmp_path / "out").named_modules():
        if name.endswith("_proj"):
            own = 0 if name.endswith("down_proj") else 16
            assert wanted[name] == module.layout.get("rotation", 0) == own
            assert ("rotated by 16" in repr(module)) == bool(own)


def test_a_method_that_forgets_the_rotation_is_found_out(
    pico: Any, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Rtn.quantize_block

    def forgetful(*arguments: Any, **options: Any) -> Any:
        result = whole(*arguments, **options)
        result.weights = {name: dataclasses.replace(w, rotation=0) for name, w in result.weights.items()}
        return result

    monkeypatch.setattr(Rtn, "quantize_block", forgetful)
    with pytest.raises(BitfloorError, match="rtn rotated .* by 0, not by 16"):
        api.quantize(pico("llama"), tmp_path / "out", rotated(small, {"name": "rtn"}))

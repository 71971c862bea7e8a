"""PTQ1.61 from the recipe to the loaded model: planned, stored, resumed, tuned, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_learned_rounding import hashes
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.pipeline.events import Event

IDS = torch.tensor([[1, 5, 9, 20, 31]])
MODELS = ["llama", "gpt2", "mixtral"]
# What stores an order, block 0, and how many matrices use it.
ORDERS = {
    "llama": {"self_attn.q_proj": 3, "self_attn.o_proj": 1, "mlp.gate_proj": 2, "mlp.down_proj": 1},
    "gpt2": {"attn.c_attn": 1, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1},
    "mixtral": {"self_attn.q_proj": 3, "self_attn.o_proj": 1}
    | {f"mlp.experts.{e}.{part}": 1 for e in range(4) for part in ("gate_up_proj", "down_proj")},
}


def ptq161(small: dict[str, Any], **changes: Any) -> dict[str, Any]:
    method = {"name": "ptq161", "steps": 4, "check_every": 1, "rate": 0.002, **changes.pop("method", {})}
    return {**small, "method": method, "spec": {"bits": 1, "group_size": -1, **changes.pop("spec", {})}, **changes}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            found.update({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
    return found


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return found


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every matrix in the files."""
    sizes = dict.fromkeys(config(folder)["matrices"], 0)
    for name, tensor in tensors(folder).items():
        if name.rpartition(".")[0] in sizes and not name.endswith(".bias"):
            sizes[name.rpartition(".")[0]] += tensor.numel() * tensor.element_size()
    return sizes


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_planned_is_stored_and_loads_to_the_dense_model(
    name: str, kind: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = ptq161(small, spec={"scale_dtype": kind})
    planned = api.plan(pico(name), recipe)
    report = api.quantize(pico(name), tmp_path / "out", recipe)
    assert {key: report[key] for key in ("bytes", "bits_per_linear_weight")} == {
        key: planned[key] for key in ("bytes", "bits_per_linear_weight")
    }
    sizes = {m["name"]: m["bytes"] for m in planned["matrices"] if m["kept"] is None}
    assert stored_bytes(tmp_path / "out") == sizes
    model = api.load(tmp_path / "out", dtype=torch.float32)
    api.export(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-3, atol=1e-3)
    losses = {json.dumps(found["learning"]) for found in report["matrices"].values() if found["learning"]}
    assert len(losses) == 3 and all(json.loads(one)["after"] < json.loads(one)["before"] for one in losses)


@pytest.mark.parametrize("name", MODELS)
def test_an_order_is_stored_once_for_what_one_tensor_feeds(
    name: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    api.quantize(pico(name), tmp_path / "out", ptq161(small))
    settings, found = config(tmp_path / "out"), tensors(tmp_path / "out")
    first = next(name for name in settings["matrices"] if ".0." in name)
    prefix = first.partition(".0.")[0] + ".0."
    stored = {n.removeprefix(prefix).removesuffix(".order") for n in found if n.startswith(prefix) and ".order" in n}
    assert stored == set(ORDERS[name])
    users = [first for name, first in settings["orders"].items() if name.startswith(prefix)]
    assert {n: 1 + users.count(prefix + n) for n in stored} == ORDERS[name]
    for matrix, other in settings["orders"].items():
        assert f"{matrix}.order" not in found and found[f"{other}.order"].dtype is torch.uint8
    for layout in settings["layouts"]:
        if layout["kind"] not in ("embedding", "head"):
            assert [part["bits"] for part in layout["segments"]] == [4, 1]
            assert layout["segments"][0]["columns"] == {48: 9, 80: 16, 192: 32}[layout["shape"][1]]


def test_a_kept_matrix_leaves_the_mask_of_its_group(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    """The query kept: key and value share the order that all three had; the output projection has its own."""
    api.quantize(pico("llama"), tmp_path / "all", ptq161(small))
    recipe = ptq161(small, layers=[{"match": "*.q_proj", "keep": True}])
    planned = api.plan(pico("llama"), recipe)
    report = api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert report["bytes"] == planned["bytes"]
    every, some = tensors(tmp_path / "all"), tensors(tmp_path / "out")
    prefix = "model.layers.0.self_attn"
    assert torch.equal(every[f"{prefix}.q_proj.order"], some[f"{prefix}.k_proj.order"])
    assert config(tmp_path / "out")["orders"][f"{prefix}.v_proj"] == f"{prefix}.k_proj"
    assert f"{prefix}.o_proj.order" in some and f"{prefix}.q_proj.weight" in some
    api.load(tmp_path / "out", dtype=torch.float32)(IDS)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_channels_of_one_width_have_no_order(
    ratio: float, name: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = ptq161(small, method={"ratio": ratio})
    planned = api.plan(pico(name), recipe)
    assert api.quantize(pico(name), tmp_path / "out", recipe)["bytes"] == planned["bytes"]
    assert {m["bits"] for m in planned["matrices"] if m["kept"] is None and "layers" in m["name"]} == {
        4 if ratio else 1
    }
    assert config(tmp_path / "out")["orders"] == {} and not any(".order" in n for n in tensors(tmp_path / "out"))
    api.load(tmp_path / "out", dtype=torch.float32)(IDS)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("tune", [False, True], ids=["plain", "tuned"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tune: bool, name: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = ptq161(small) | ({"tune": {"steps": 3}} if tune else {})
    api.quantize(pico(name), tmp_path / "whole", recipe)

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(pico(name), tmp_path / "out", recipe, progress=stop)
    api.quantize(pico(name), tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_tuning_leaves_what_has_channel_scales_and_says_so(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    """Norms are tuned, and matrices without one-bit channels; the others stay bit for bit."""
    told: list[str] = []
    plain = ptq161(small)
    api.quantize(pico("llama"), tmp_path / "plain", plain)
    tuned = plain | {"tune": {"steps": 8, "rate": 0.02}}
    report = api.quantize(pico("llama"), tmp_path / "tuned", tuned, progress=lambda event: told.append(event.message))
    assert any("tuning leaves the scales of 21 matrices: they have channel scales" in message for message in told)
    assert report["tuning"]["after"] < report["tuning"]["before"]
    assert all("norm" in name for name in report["tuning"]["tuned"])
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("norm" in name for name in changed)
    api.load(tmp_path / "tuned", dtype=torch.float32)(IDS)
    whole = ptq161(small, method={"ratio": 1.0}) | {"tune": {"steps": 2}}
    report = api.quantize(pico("llama"), tmp_path / "whole", whole)
    assert "model.layers.0.mlp.down_proj.scale" in report["tuning"]["tuned"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spec": {"bits": 2}}, "is to have bits = 2; use spec.bits=1, or keep"),
        ({"spec": {"group_size": 64}}, "is to have group_size = 64; use spec.group_size=-1, or keep"),
        ({"spec": {"rotation": 16}}, "is to have rotation = 16; use spec.rotation=0, or keep"),
        ({"spec": {"symmetric": True}}, "is to have symmetric = true; use spec.symmetric=false, or keep"),
        (
            {"spec": {"bits": 4, "group_size": 8}},
            "bits = 4, group_size = 8; use spec.bits=1 spec.group_size=-1, or keep",
        ),
        ({"layers": [{"match": "*.down_proj", "bits": 4}]}, "layers.0.mlp.down_proj is to have bits = 4"),
        ({"allocation": {"policy": "budget", "average": 1.5}}, "ptq161 chooses whole channels and not groups"),
        ({"allocation": {"plan": "/nowhere.json"}}, "cannot read the plan"),
        ({"method": {"ratio": 2.0}}, "ratio = 2 is not a share"),
        ({"method": {"score": "most"}}, "use max or mean or gain or random"),
    ],
)
def test_a_storage_that_it_has_not_is_refused_and_nothing_written(
    changes: dict[str, Any], says: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = ptq161(small, **changes)
    with pytest.raises(InputError, match=says):
        api.plan(pico("llama"), recipe)
    with pytest.raises(InputError, match=says):
        api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()

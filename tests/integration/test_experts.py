"""Mixtures of experts: every expert is a matrix of its own, and those that saw too few tokens are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.pipeline.events import Event
from bitfloor.runtime.linear import PackedMatrix, cache_weights

Recipe = dict[str, Any]
FAMILIES = ["mixtral", "qwen3_moe"]
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def made(
    request: pytest.FixtureRequest, pico: Callable[..., Path], recipe: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[Event]]:
    """The float model, its quantized folder, and what the run told; 16 tokens choose two experts of four each."""
    model = pico(request.param, num_hidden_layers=2)
    out = tmp_path_factory.mktemp("experts") / "out"
    events: list[Event] = []
    chosen = recipe("gptq", 4)
    chosen["calibration"] = {**chosen["calibration"], "sequences": 1, "seqlen": 16}
    api.quantize(model, out, chosen, progress=events.append)
    return model, out, events


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def float_model(folder: Path) -> Any:
    # One expert after another, as packed experts run; the grouped product sums in another order.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def test_experts_are_stored_one_by_one(made: tuple[Path, Path, list[Event]]) -> None:
    _, out, _ = made
    checkpoint = read_checkpoint(out)
    experts = [n for n in checkpoint.native.matrices if checkpoint.native.layout_of(n)["kind"] == "expert"]
    assert len(experts) == 2 * 4 * 2  # blocks, experts, gate_up and down
    assert all(f"{name}.codes" in checkpoint.tensors for name in experts)
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in checkpoint.tensors)
    assert any(".gate." in name or "router" in name for name in checkpoint.native.kept)  # routers stay float


def test_starved_experts_are_named_and_rounded_to_nearest(made: tuple[Path, Path, list[Event]]) -> None:
    _, out, events = made
    matrices = json.loads((out / "bitfloor.json").read_text())["matrices"]
    starved = {name: m["note"] for name, m in matrices.items() if m["note"]}
    assert starved and all(".experts." in name for name in starved)
    assert len(starved) < sum(".experts." in name for name in matrices)  # others saw enough
    for name, note in starved.items():
        assert note.startswith("saw ") and "calibration tokens for" in note and "rounded to nearest" in note
        assert any(e.kind == "note" and e.message.startswith(f"{name}: saw ") for e in events)
    assert all((m["output_error"] is None) == (" 0 calibration" in (m["note"] or "")) for m in matrices.values())


def test_the_packed_model_is_the_float_model_with_its_weights_rounded(made: tuple[Path, Path, list[Event]]) -> None:
    model, out, _ = made
    packed = api.load(out)
    cache_weights(packed)
    dense = float_model(model)
    before = logits(dense)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, PackedMatrix):
                path, _, rest = name.partition(".experts.")
                weight = module.dense(torch.float32).T if module.layout["transposed"] else module.dense(torch.float32)
                if rest:
                    index, _, param = rest.partition(".")
                    dense.get_parameter(f"{path}.experts.{param}")[int(index)].copy_(weight)
                else:
                    dense.get_submodule(name).weight.copy_(weight)
    assert torch.equal(logits(packed), logits(dense)) and not torch.equal(logits(dense), before)


def test_the_dense_export_stacks_the_experts_again(made: tuple[Path, Path, list[Event]], tmp_path: Path) -> None:
    _, out, _ = made
    api.export(out, tmp_path / "dense")
    packed = api.load(out)
    cache_weights(packed)
    assert torch.equal(logits(float_model(tmp_path / "dense")), logits(packed))


def test_round_to_nearest_names_experts_without_a_token(pico: Any, recipe: Any, tmp_path: Path) -> None:
    chosen = recipe("rtn", 3)
    chosen["calibration"] = {**chosen["calibration"], "sequences": 1, "seqlen": 2}
    report = api.quantize(pico("mixtral", num_hidden_layers=2), tmp_path / "out", chosen)
    notes = [m["note"] for m in report["matrices"].values() if m["note"]]
    # Two tokens with two experts each leave at least none and at most two of four without any; the text decides.
    assert all("saw no calibration token" in note for note in notes)
    unseen = [name for name, m in report["matrices"].items() if m["note"]]
    assert {name.rpartition(".")[0] for name in unseen if name.endswith("gate_up_proj")} == {
        name.rpartition(".")[0] for name in unseen if name.endswith("down_proj")
    }


def test_plan_and_report_agree_when_experts_are_kept(pico: Any, recipe: Any, tmp_path: Path) -> None:
    chosen = recipe("rtn-minmax", 3, layers=[{"match": "*.0.mlp.experts.*", "keep": True, "reason": "a test"}])
    model = pico("qwen3_moe", num_hidden_layers=2)
    planned = api.plan(model, chosen)
    report = api.quantize(model, tmp_path / "out", chosen)
    assert planned["bytes"] == report["bytes"]
    assert planned["bytes"]["total"] == read_checkpoint(tmp_path / "out").nbytes
    ends = planned["bytes"]["embeddings"] + planned["bytes"]["linears"]
    assert sum(matrix["bytes"] for matrix in planned["matrices"]) == ends
    assert logits(api.load(tmp_path / "out")).isfinite().all()


def test_some_experts_of_a_stack_cannot_be_kept_alone(pico: Any, recipe: Any, tmp_path: Path) -> None:
    chosen = recipe("rtn-minmax", 3, layers=[{"match": "*.0.mlp.experts.1.*", "keep": True}])
    with pytest.raises(InputError, match="keeps some of the experts stacked in .* keep all of them or none"):
        api.quantize(pico("qwen3_moe", num_hidden_layers=2), tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()


def test_experts_that_are_multiplied_in_a_batch_load_and_compute(
    pico: Callable[..., Path], recipe: Any, tmp_path: Path
) -> None:
    """Llama 4 hands its whole stack to one batched product instead of indexing it."""
    model = pico("llama4_text", num_hidden_layers=2)
    api.quantize(model, tmp_path / "out", recipe("rtn", 4))
    packed = api.load(tmp_path / "out", dtype=torch.float32)
    reference = float_model(model)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if not isinstance(module, PackedMatrix):
                continue
            dense = module.dense(torch.float32)
            if module.layout["kind"] == "expert":
                path, _, rest = name.partition(".experts.")
                index, param = rest.split(".")
                stack = reference.get_submodule(f"{path}.experts").get_parameter(param)
                stack[int(index)].copy_(dense.T if module.layout["transposed"] else dense)
            else:
                reference.get_submodule(name).weight.copy_(dense)
    # Panels of a packed linear sum in another order than one whole product.
    assert torch.allclose(logits(packed), logits(reference), atol=1e-4)

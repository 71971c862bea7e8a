"""From a recipe to a folder, and back out of it by every door: the same numbers behind each of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trained import CONTEXT, VOCABULARY
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitfloor import api
from bitfloor.cli.inspection import inspect_folder
from bitfloor.cli.main import main
from bitfloor.core.errors import InputError
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.methods.options import GptqConfig
from bitfloor.runtime.linear import PackedMatrix, cache_weights

Folder = Callable[..., Path]
Recipe = Callable[..., dict[str, Any]]
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def float_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file: sums depend on the alignment
    return model


def put_dequantized(model: Any, packed: Any) -> Any:
    """Copy what the packed matrices stand for into the parameters of a float model."""
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, PackedMatrix):
                model.get_submodule(name).weight.copy_(module.dense(torch.float32))
    return model


# -- what is written ---------------------------------------------------------------------------------------------


def test_the_report_counts_the_bytes_in_the_files(trained: Path, quantized: Folder) -> None:
    folder = quantized("gptq", 3)
    report = json.loads((folder / "bitfloor.json").read_text())
    checkpoint = read_checkpoint(folder)
    assert report["bytes"]["total"] == checkpoint.nbytes
    linears = [name for name in checkpoint.native.matrices if ".layers." in name]
    assert len(linears) == 3 * 7
    stored = sum(checkpoint.matrix_bytes(name) for name in linears)
    weights = sum(prod(checkpoint.native.layout_of(name)["shape"]) for name in linears)
    assert report["bytes"]["linears"] == stored
    assert report["bits_per_linear_weight"] == 8 * stored / weights
    # 3 bits, a 16-bit scale and a 3-bit zero-point for 32 columns; 176 = 5.5 * 32 is padded to 6 * 32.
    assert 3 + 19 / 32 < report["bits_per_linear_weight"] < 3.9
    assert report["bytes"]["embeddings"] == VOCABULARY * 64 * 4 and report["kept"] == {
        "model.embed_tokens": "embedding.bits is 16"
    }
    assert report["parameters"] == sum(p.numel() for p in float_model(trained).parameters())
    found = inspect_folder(folder)
    assert {layer.name: layer.nbytes for layer in found.layers} == {n: checkpoint.matrix_bytes(n) for n in linears}
    assert not (folder / ".bitfloor").exists() and not list(folder.glob("*.tmp"))


def test_the_report_says_what_was_done(quantized: Folder) -> None:
    report = json.loads((quantized("gptq", 3) / "bitfloor.json").read_text())
    assert set(report) == {
        *("recipe_name", "recipe_sha256", "recipe", "matrices", "kept", "made_from", "files", "companions"),
        *("bits_per_linear_weight", "bits_per_parameter", "bytes", "parameters", "bytes_at_16_bits"),
    }
    assert set(report["bytes"]) == {"total", "linears", "embeddings", "other"}
    assert sum(v for k, v in report["bytes"].items() if k != "total") == report["bytes"]["total"]
    later = {"choose", "sequential"}  # left out where they are at their defaults
    usual = {key: value for key, value in asdict(GptqConfig()).items() if key not in later}
    assert report["recipe"]["method"] == {"name": "gptq", **usual}
    assert report["made_from"]["recipe"] == report["recipe_sha256"]
    errors = []
    for name, matrix in report["matrices"].items():
        assert set(matrix) == {"block_error", "output_error", "learning", "note"}, name
        assert 0 < matrix["output_error"] < 0.2 and 0 < matrix["block_error"] < 0.2 and matrix["note"] is None, name
        errors.append(matrix["block_error"])
    assert len(set(errors)) == 3  # one for each block


def test_inspect_prints_the_documented_document(quantized: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized("gptq", 3)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "recipe",
        "format_version",
        "verified",
        "bits_per_linear_weight",
        "bits_per_parameter",
        "bytes",
        "tuning",
        "restoration",
        "layers",
    }
    assert found["format_version"] == 1 and found["verified"] is None
    assert set(found["bytes"]) == {"total", "linears", "embeddings", "other"}
    keys = {"name", "shape", "segments", "rotation", "sorted", "bytes", "bits_per_weight", "block_error", "learning"}
    assert all(set(layer) == keys and layer["block_error"] > 0 for layer in found["layers"])
    layer = {layer["name"]: layer for layer in found["layers"]}["model.layers.1.mlp.down_proj"]
    assert layer["shape"] == [64, 176] and layer["segments"] == [{"bits": 3, "columns": 176, "group_size": 32}]
    assert layer["rotation"] == 0


ODD = {"*.down_proj": {"bits": 6, "symmetric": True}, "*.0.*_proj": {"bits": 1}, "*.1.self_attn.o_proj": {"keep": True}}
SPECS: dict[str, dict[str, Any]] = {
    "symmetric": {"spec": {"bits": 4, "group_size": 32, "symmetric": True}},
    "whole rows": {"spec": {"bits": 5, "group_size": -1}},
    "ragged groups": {"spec": {"bits": 2, "group_size": 48}, "embedding": {"bits": 4, "group_size": 48}},
    "one bit": {"spec": {"bits": 1, "group_size": 64}, "embedding": {"bits": 8}},
    "six bits": {"spec": {"bits": 6, "group_size": 64, "scale_dtype": "bfloat16"}},
    "eight bits": {"spec": {"bits": 8, "group_size": 128}, "embedding": {"bits": 16}, "head": {"bits": 4}},
    "rules": {"layers": [{"match": glob, **change} for glob, change in ODD.items()]},
}


@pytest.mark.parametrize("case", sorted(SPECS))
def test_plan_foretells_every_byte(case: str, pico: Folder, recipe: Recipe, tmp_path: Path) -> None:
    chosen = recipe("rtn-minmax", 3, **SPECS[case])
    model = pico("llama", num_hidden_layers=2)
    planned = api.plan(model, chosen)
    assert planned["fits"] and planned["peak_memory_bytes"] > 0
    api.quantize(model, tmp_path / "out", chosen)
    checkpoint = read_checkpoint(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "bitfloor.json").read_text())
    for key in ("bytes", "bits_per_linear_weight", "bits_per_parameter", "parameters", "bytes_at_16_bits"):
        assert planned[key] == report[key], key
    assert planned["bytes"]["total"] == checkpoint.nbytes
    for matrix in planned["matrices"]:
        name = matrix["name"]
        if matrix["kept"] is None:
            assert matrix["bytes"] == checkpoint.matrix_bytes(name), name
            segment = checkpoint.native.layout_of(name)["segments"][0]
            assert (matrix["bits"], matrix["group_size"]) == (segment["bits"], segment["group_size"])
        else:
            assert matrix["bytes"] == checkpoint.tensors[f"{name}.weight"][1].nbytes and name in report["kept"]
    assert logits(api.load(tmp_path / "out")).isfinite().all()


# -- what is read back -------------------------------------------------------------------------------------------


def test_the_packed_model_is_the_float_model_with_its_weights_rounded(trained: Path, quantized: Folder) -> None:
    packed = api.load(quantized("gptq", 3))
    original = float_model(trained)
    before = logits(original)
    expected = logits(put_dequantized(original, packed))
    assert not torch.equal(expected, before)
    cache_weights(packed)  # one product for each matrix, as in the float model
    assert torch.equal(logits(packed), expected)
    cache_weights(packed, False)
    # Panels of rows sum the same products; the library may take another order for another number of rows.
    assert torch.allclose(logits(packed), expected, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_the_rounded_model(trained: Path, quantized: Folder) -> None:
    folder = quantized("gptq", 3)
    prompt = "The object is "
    text = api.generate(folder, prompt, max_new_tokens=16)
    dense = put_dequantized(float_model(trained), api.load(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = dense.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert text and text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_dense_export_is_an_ordinary_model(quantized: Folder, tmp_path: Path) -> None:
    folder = quantized("gptq", 3)
    result = api.export(folder, tmp_path / "dense")
    assert result["format"] == "dense" and result["bytes"] == (tmp_path / "dense" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    packed = api.load(folder)
    cache_weights(packed)
    dense = float_model(tmp_path / "dense")
    assert not any(isinstance(module, PackedMatrix) for module in dense.modules())
    assert torch.equal(logits(dense), logits(packed))
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("ab").input_ids == [
        *AutoTokenizer.from_pretrained(folder)("ab").input_ids
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 1}, "and missing in the model"),
        ({"num_hidden_layers": 40}, "is missing in the checkpoint"),
        ({"intermediate_size": 24}, "24] in the model"),
    ],
)
def test_an_export_under_another_models_configuration_is_refused(
    quantized: Folder, tmp_path: Path, changes: dict[str, int], told: str
) -> None:
    folder = shutil.copytree(quantized("gptq", 3), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match="is of another model") as caught:
        api.export(folder, tmp_path / "dense")
    assert told in str(caught.value)
    assert not (tmp_path / "dense").exists()


# -- what it costs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nll(trained: Path, quantized: Folder, texts: Any) -> Callable[..., float]:
    """Mean log-loss on held-out text, of the float model or of a quantized one."""
    known: dict[tuple[Any, ...], float] = {}

    def measure(*which: Any) -> float:
        if which not in known:
            folder = quantized(*which) if which else trained
            entry = api.evaluate(folder, perplexity=[texts.evaluation], windows=None, seqlen=CONTEXT)["perplexity"][0]
            assert entry["windows"] > 20 and entry["vs_baseline"] is None
            known[which] = float(torch.tensor(entry["value"], dtype=torch.float64).log())
        return known[which]

    return measure


def test_the_model_has_learnt_something(nll: Callable[..., float]) -> None:
    # 257 tokens: 5.5 nats for a blind guess, about 3.1 for one that only knows how often each letter occurs.
    assert nll() < 2.6


def test_fewer_bits_cost_more(nll: Callable[..., float]) -> None:
    assert nll() < nll("rtn", 4) < nll("rtn", 3) < nll("rtn", 2)


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_is_better_than_rounding_to_nearest(bits: int, nll: Callable[..., float]) -> None:
    assert nll("gptq", bits) < nll("rtn-minmax", bits)


def test_searched_ranges_are_better_than_minimum_and_maximum(nll: Callable[..., float]) -> None:
    assert nll("rtn", 3) < nll("rtn-minmax", 3)


def test_the_difference_to_the_float_model_comes_with_its_interval(
    trained: Path, quantized: Folder, texts: Any, nll: Callable[..., float]
) -> None:
    result = api.evaluate(
        quantized("rtn", 2),
        perplexity=[texts.evaluation],
        windows=None,
        seqlen=CONTEXT,
        baseline=trained,
        divergence=True,
    )
    (entry,) = result["perplexity"]
    difference = entry["vs_baseline"]
    # The same sums in float64, once over windows and once over tokens, all windows being equally long.
    assert difference["delta_nll"] == pytest.approx(nll("rtn", 2) - nll(), abs=1e-9)
    low, high = difference["ci95"]
    assert 0 < low < difference["delta_nll"] < high
    assert entry["divergence"]["kl"] > 0 and 0.5 < entry["divergence"]["top1_agreement"] < 1

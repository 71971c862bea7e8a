"""Methods that learn by gradients, through the whole pipeline: every kind of block, resuming, and what it is worth."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import CONFIGS
from safetensors.torch import load_file, save_file

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.pipeline.events import Event
from bitfloor.recipe.load import load_recipe

Recipe = dict[str, Any]
METHODS = ("signround", "bitfloor", "omniquant")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((name, "bitfloor") for name in sorted(CONFIGS)),
        *((name, method) for name in ("llama", "gpt2", "mixtral") for method in ("signround", "omniquant")),
    ],
)
def test_gradients_flow_through_every_kind_of_block(
    architecture: str, method: str, pico: Any, learned: Any, tmp_path: Path
) -> None:
    model = pico(architecture)
    before = api.quantize(model, tmp_path / "start", learned(method, steps=0))
    after = api.quantize(model, tmp_path / "learned", learned(method, steps=4, rate=0.1))
    assert before["bytes"] == after["bytes"]
    assert hashes(tmp_path / "start")["config.json"] and hashes(tmp_path / "start") != hashes(tmp_path / "learned")
    assert api.load(tmp_path / "learned")(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bytes(method: str, pico: Any, learned: Any, tmp_path: Path) -> None:
    model, recipe = pico("llama"), learned(method, steps=5)
    api.quantize(model, tmp_path / "whole", recipe)

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(model, tmp_path / "out", recipe, progress=stop, spill=tmp_path / "spill")
    api.quantize(model, tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_run_is_not_continued_with_products_of_another_type(
    pico: Any, learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``precision: auto`` means another type on another processor, and with it other bytes."""
    model, recipe, out = pico("llama"), learned("signround", steps=2), tmp_path / "out"

    def stop(event: Event) -> None:
        if event.kind == "block":
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(model, out, recipe, progress=stop)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    with pytest.raises(InputError, match="products was float32 and is now bfloat16"):
        api.quantize(model, out, recipe)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {}, raising=False)
    report = api.quantize(model, out, recipe)
    assert report["recipe"]["calibration"]["precision"] == "float32"


def test_an_unknown_setting_of_the_kernels_is_refused_before_anything_is_written(
    pico: Any, learned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITFLOOR_KERNELS", "foo")
    with pytest.raises(InputError, match="BITFLOOR_KERNELS=foo is not known"):
        api.quantize(pico("llama"), tmp_path / "out", learned("signround", steps=1))
    assert not (tmp_path / "out").exists()


def nll(model: Path, texts: Any) -> float:
    (entry,) = api.evaluate(model, perplexity=[texts.evaluation], windows=None, seqlen=256)["perplexity"]
    return float(torch.tensor(entry["value"], dtype=torch.float64).log())


@pytest.mark.parametrize("method", METHODS)
def test_learning_makes_a_trained_model_better_than_its_start(
    method: str, trained: Path, learned: Any, texts: Any, tmp_path: Path
) -> None:
    losses = []
    for steps in (0, 60):
        rate = 0.1 if method == "omniquant" else 0.015  # of logits, and of steps of the grid
        recipe = learned(method, bits=2, steps=steps, rate=rate)
        recipe["calibration"] |= {"sequences": 16, "seqlen": 128, "batch_size": 4}
        api.quantize(trained, tmp_path / str(steps), recipe)
        losses.append(nll(tmp_path / str(steps), texts))
    assert losses[1] < losses[0] - 0.02


@pytest.mark.parametrize("method", METHODS)
def test_one_bit_is_learnt_beside_others(method: str, pico: Any, learned: Any, tmp_path: Path) -> None:
    recipe = learned(method)
    recipe["layers"] = [{"match": "*.down_proj", "bits": 1}]
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    layer = api.load(tmp_path / "out").model.layers[0].mlp.down_proj
    assert layer(torch.randn(2, layer.in_features)).isfinite().all()
    assert len(layer.dense().unique(dim=None)) > 2 and all(len(row.unique()) <= 2 * 8 for row in layer.dense())


def test_fewer_sequences_than_a_batch_are_one_batch(pico: Any, learned: Any, tmp_path: Path) -> None:
    recipe = learned("signround", steps=3)
    recipe["calibration"] |= {"sequences": 3, "batch_size": 8}
    api.quantize(pico("llama", num_hidden_layers=2), tmp_path / "out", recipe)
    assert api.load(tmp_path / "out")(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_weights_that_are_outliers_do_not_end_in_nan(pico: Any, learned: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in pico("llama", num_hidden_layers=2).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:, 3] *= 1e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for method in METHODS:
        api.quantize(model, tmp_path / method, learned(method, steps=6))
        assert api.load(tmp_path / method)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_an_option_of_a_learning_method_is_checked_with_the_recipe() -> None:
    with pytest.raises(InputError, match="calibration.precision"):
        load_recipe("signround-w2g64", ["calibration.precision=float16"])
    with pytest.raises(InputError, match="steps = -1 is not a number of updates"):
        load_recipe("signround-w2g64", ["method.steps=-1"])

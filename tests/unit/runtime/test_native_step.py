"""The native step beside transformers on the same packed model: every family and mode, and what a sequence can do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native_cases import PROMPTS, TIGHT, check, eager, four_bits, greedy, need_kernels, off, packed

from bitfloor.ops import packed_native
from bitfloor.ops.backend import int8
from bitfloor.ops.packed_native import LEVELS
from bitfloor.runtime.hf import load_packed
from bitfloor.runtime.native_step import NativeDecoder


@pytest.fixture(autouse=True)
def kernels() -> None:
    need_kernels()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    library = packed_native.load().library
    assert library is not None
    if LEVELS.index(request.param) > LEVELS.index(library.best):
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(library, "level", LEVELS.index(request.param))
    yield request.param


ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, scaled positions": ("llama", {"rope_parameters": {**ROPE, "original_max_position_embeddings": 32}}),
    "llama, positions divided": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama, positions by yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, one key head": ("llama", {"num_key_value_heads": 1, "num_attention_heads": 6, "head_dim": 8}),
    "mistral, window of 6": ("mistral", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, windows of 6 in some layers": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[family]
    check(packed(tmp_path / "m", kind, **changes), PROMPTS[1:])


def test_every_instruction_set(level: str, tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama", attention_bias=True)
    check(model, PROMPTS[2:3])
    with int8():
        check(model, PROMPTS[2:3], tight=0.02)


@pytest.mark.parametrize("family", ["llama", "qwen2, windows of 6 in some layers", "qwen3"])
def test_rounded_inputs(family: str, tmp_path: Path) -> None:
    kind, changes = FAMILIES[family]
    model = packed(tmp_path / "m", kind, **changes)
    exact = eager(model, PROMPTS[2])
    with int8():
        # A sum that is off by a last bit can round another way, which is a hundredth of one input of one product.
        check(model, tight=0.02)
        assert off(NativeDecoder(model, 64).prefill(PROMPTS[2]), exact) > 1e-4  # they are rounded


@pytest.mark.parametrize("keep", ["embedding", "head", "q_proj", "down_proj", "everything"])
def test_what_stayed_float_is_read_as_it_is(keep: str, tmp_path: Path) -> None:
    def choose(name: str, kind: str) -> tuple[int, int] | None:
        stays = keep in (kind, "everything") or name.endswith(keep)
        return None if stays and name != "model.layers.0.mlp.up_proj" else four_bits(name, kind)

    check(packed(tmp_path / "m", "llama", choose, attention_bias=True), PROMPTS[2:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    choose = lambda name, kind: None if kind in ("embedding", "head") else four_bits(name, kind)  # noqa: E731
    model = packed(tmp_path / "m", "llama", choose, attention_bias=True)
    half = load_packed(tmp_path / "m", dtype=dtype)
    for parameter in model.parameters():  # what stayed float was rounded when it was loaded
        parameter.data = parameter.data.to(dtype).float()
    found = NativeDecoder(half, 64).prefill(PROMPTS[2])
    assert half.lm_head.weight.dtype == dtype
    assert off(found, eager(model, PROMPTS[2])) < TIGHT < off(found, eager(half, PROMPTS[2]))


def test_prefill_and_steps_are_one_and_the_same(tmp_path: Path) -> None:
    model, ids = packed(tmp_path / "m", "qwen3"), PROMPTS[3]
    whole = NativeDecoder(model, 96).prefill(ids)
    for cut in (1, 3, 17, 64, 69):
        decoder = NativeDecoder(model, 96)
        decoder.prefill(ids[:cut])
        for token in ids[cut:-1]:
            decoder.step(token)
        assert off(decoder.step(ids[-1]), whole) < TIGHT


def test_what_was_forgotten_leaves_nothing_behind(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "mistral")
    decoder = NativeDecoder(model, 80)
    decoder.prefill(list(range(70)))
    decoder.truncate(9)
    assert decoder.length == 9
    again = decoder.prefill([4, 4, 4])
    fresh = NativeDecoder(model, 80)
    fresh.prefill(list(range(9)))
    assert off(again, fresh.prefill([4, 4, 4])) < TIGHT
    decoder.truncate(0)
    assert torch.equal(decoder.prefill(PROMPTS[2]), NativeDecoder(model, 80).prefill(PROMPTS[2]))


def test_no_bit_depends_on_threads(tmp_path: Path) -> None:
    model, found = packed(tmp_path / "m", "llama", hidden_size=512, intermediate_size=640), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            decoder = NativeDecoder(model, 96)
            found.append(torch.stack([decoder.prefill(PROMPTS[3]), decoder.step(3)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_decoders_of_one_model_do_not_know_of_each_other(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama")
    wanted = greedy(NativeDecoder(model, 64), PROMPTS[1])
    found: list[list[int]] = []

    def work() -> None:
        found.append(greedy(NativeDecoder(model, 64), PROMPTS[1]))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [wanted] * 4


def test_the_weights_are_read_in_place_and_outlive_the_model(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama")
    decoder = NativeDecoder(model, 64)
    before = decoder.prefill(PROMPTS[1])
    model.model.layers[0].mlp.up_proj.codes.zero_()
    decoder.truncate(0)
    changed = decoder.prefill(PROMPTS[1])
    assert off(changed, eager(model, PROMPTS[1])) < TIGHT < off(changed, before)
    del model
    decoder.truncate(0)
    assert torch.equal(decoder.prefill(PROMPTS[1]), changed)

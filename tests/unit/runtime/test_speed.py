"""What ``bitfloor bench`` counts: bytes by hand, who takes turns, what is left out and why. No speed is asserted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import pack_model
from pico import save_pico
from transformers import AutoModelForCausalLM

from bitfloor.core.errors import InputError
from bitfloor.ops import packed_native
from bitfloor.ops.backend import activations, backend
from bitfloor.runtime import speed
from bitfloor.runtime.hf import load_packed
from bitfloor.runtime.speed import Contestant, SpeedOptions, bench_model, fill_randomly, weight_bytes

Made = Callable[..., tuple[Path, Path]]
QUICK = SpeedOptions(prompt_tokens=12, new_tokens=3, rounds=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Folders of a pico model, float and packed."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            save_pico(root / "float", name)
            model = AutoModelForCausalLM.from_pretrained(root / "float")
            pack_model(model, root / "packed", lambda matrix, kind: (4, 16))
            known[name] = root / "float", root / "packed"
        return known[name]

    return make


def stored(rows: int, columns: int, bits: int = 4, group: int = 16) -> int:
    """Bytes of a packed matrix: codes, scales, zero-points."""
    blocks, groups = -(-rows // 16), -(-columns // group)
    return blocks * (64 * bits * -(-columns // 32) + 32 * groups + 2 * bits * groups)


def block_bytes(mlp: int = 1) -> int:
    """A block of the pico Llama: q, k, v, o; gate, up, down; two norms of 48."""
    attention = 2 * stored(48, 48) + 2 * stored(24, 48)
    return attention + mlp * (2 * stored(80, 48) + stored(48, 80)) + 2 * 48 * 4


def test_a_step_reads_a_row_of_an_embedding_unless_it_is_the_head(made: Made) -> None:
    embedding, rest = stored(128, 48), 3 * block_bytes() + 48 * 4
    whole, read = weight_bytes(load_packed(made("llama")[1], dtype=torch.float32))
    assert whole == 2 * embedding + rest and read == embedding + embedding // 128 + rest
    whole, read = weight_bytes(load_packed(made("llama_tied")[1], dtype=torch.float32))
    assert whole == read == embedding + rest


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_the_same_is_counted_of_float_models(name: str, made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made(name)[0])
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    whole, read = weight_bytes(model)
    assert whole == parameters and read == parameters - (4 * 127 * 48 if name == "llama" else 0)


def test_a_step_reads_the_experts_that_a_token_is_sent_to(made: Made) -> None:
    model = load_packed(made("mixtral")[1], dtype=torch.float32)
    config = model.config
    experts = sum(
        module.get_buffer(part).numel() * module.get_buffer(part).element_size()
        for name, module in model.named_modules()
        if ".experts." in f"{name}." and hasattr(module, "part_names")
        for part in module.part_names
    )
    whole, read = weight_bytes(model)
    embedding = stored(128, 48)
    unread = experts - experts * config.num_experts_per_tok // config.num_local_experts
    # Rounded down for every matrix.
    assert 0 <= whole - (embedding - embedding // 128) - unread - read <= 1 and unread > 0


def test_random_weights_keep_what_is_shared_and_are_normal_numbers(made: Made) -> None:
    from bitfloor.modeling.skeleton import build_skeleton, load_config

    model = fill_randomly(build_skeleton(load_config(made("llama_tied")[0])), torch.bfloat16)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    parameters = list(model.parameters())
    assert all(p.dtype == torch.bfloat16 and p.device.type == "cpu" and bool(p.isfinite().all()) for p in parameters)
    assert all(float(p.float().std()) > 1e-3 for p in parameters)
    assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())


def test_all_take_turns_and_the_document_has_what_is_promised(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    if packed_native.load().library is None:
        pytest.skip("the packed kernels were not built")
    order: list[str] = []
    seen: dict[str, set[str]] = {}
    run = Contestant.run

    def watched(self: Contestant, prompt: Any, new: Any) -> None:
        order.append(self.name)
        with self.within():
            seen.setdefault(self.name, set()).add(f"{backend()} {activations()}")
        run(self, prompt, new)

    monkeypatch.setattr(Contestant, "run", watched)
    threads = torch.get_num_threads()
    said: list[str] = []
    found = bench_model(made("llama")[1], QUICK, said.append)
    assert order == ["float", "int8", "half"] * 3  # once to warm up
    assert seen["float"] == {"auto float"} and seen["int8"] == {"int8 int8"}
    assert found["skipped"] == {} and found["read_gb_s"] > 0 and torch.get_num_threads() == threads
    assert (found["prompt_tokens"], found["new_tokens"], found["rounds"]) == (12, 3, 2)
    for entry, name, dtype in zip(
        found["runs"], ("float", "int8", "half"), ("float32", "float32", "bfloat16"), strict=True
    ):
        assert (entry["name"], entry["dtype"]) == (name, dtype)
        assert entry["gb_s"] == pytest.approx(entry["decode_tokens_s"] * entry["bytes_per_token"] / 1e9)
        assert entry["share_of_read"] == pytest.approx(entry["gb_s"] / found["read_gb_s"])
        assert entry["prefill_tokens_s"] > 0
    assert found["runs"][2]["times_half"] == 1.0 and said
    assert found["runs"][2]["decoder"] == "TransformersDecoder"


def test_the_best_of_the_rounds_counts() -> None:
    contestant = Contestant("float", None, nullcontext, 10, 5, "float32", [2.0, 1.0, 4.0], [8.0, 4.0, 16.0])  # type: ignore[arg-type]
    found = speed._result(contestant, 100, 8, 0.0)
    assert (found["prefill_tokens_s"], found["decode_tokens_s"], found["share_of_read"]) == (100.0, 2.0, None)


def test_a_baseline_is_loaded_in_half_precision(made: Made) -> None:
    found = bench_model(made("llama")[1], SpeedOptions(4, 2, 1, baseline=str(made("llama")[0])), lambda text: None)
    assert found["baseline"] == "float" and found["runs"][-1]["dtype"] == "bfloat16"


def test_without_memory_half_precision_is_left_out_with_the_reason(made: Made) -> None:
    for baseline in (None, str(made("llama")[0])):
        options = SpeedOptions(4, 2, 1, baseline=baseline, memory=1000)
        found = bench_model(made("llama")[1], options, lambda text: None)
        assert "need 0.0 GB of memory" in found["skipped"]["half"]
        assert all(run["name"] != "half" and run["times_half"] is None for run in found["runs"])


def test_without_kernels_there_is_no_int8_and_nothing_to_compare_reading_with(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_native, "load", lambda: packed_native.Loaded(None, "it was not built"))
    found = bench_model(made("llama")[1], SpeedOptions(4, 2, 1), lambda text: None)
    assert "it was not built" in found["skipped"]["int8"]
    assert found["read_gb_s"] is None and found["runs"][0]["share_of_read"] is None


@pytest.mark.parametrize(
    ("context", "expected"), [(None, (512, 64)), (576, (512, 64)), (500, (436, 64)), (100, (50, 50)), (3, (2, 1))]
)
def test_what_is_read_fits_in_the_context(context: int | None, expected: tuple[int, int]) -> None:
    assert SpeedOptions().fitted(context) == expected


def test_nonsense_is_refused(made: Made) -> None:
    for options in (SpeedOptions(0), SpeedOptions(1, 0), SpeedOptions(1, 1, 0), SpeedOptions(1, 1, 1, -1)):
        with pytest.raises(InputError, match="1 or more"):
            bench_model(made("llama")[1], options, lambda text: None)
    with pytest.raises(InputError, match="no prompt"):
        SpeedOptions().fitted(1)


def test_a_float_model_is_no_packed_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a float model, not a bitfloor checkpoint"):
        bench_model(save_pico(tmp_path / "m", "llama"), QUICK, lambda text: None)

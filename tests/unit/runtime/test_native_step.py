"""The native step beside transformers on the same packed model: every family, form and mode; what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_cases import matrix
from packing import pack_model
from pico import VOCAB, pico_model
from torch import Tensor, nn

from bitfloor._plugin import register_with_transformers
from bitfloor.core.errors import InputError
from bitfloor.formats.native import encode, layout
from bitfloor.ops import packed_native
from bitfloor.ops.backend import int8, reference
from bitfloor.ops.packed_native import LEVELS
from bitfloor.runtime.hf import load_packed
from bitfloor.runtime.linear import PackedLinear
from bitfloor.runtime.native_step import NativeDecoder, why_not

register_with_transformers()

PROMPTS = ([5], [7, 99, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 11, 12, 13], list(range(20, 90)))
NEW = 32
TIGHT = 1e-4  # of the largest logit: float32 sums in other orders in three layers; a lost bias gives more than 0.05
SOME = (PROMPTS[0], PROMPTS[2])  # of one token, and of more than go through the products for few rows
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
    "llama, one key head": ("llama", {"num_key_value_heads": 1, "num_attention_heads": 6, "head_dim": 8}),
    "mistral, window of 6": ("mistral", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, windows of 6 in some layers": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.fixture(autouse=True)
def kernels() -> None:
    if packed_native.load().library is None:
        pytest.skip(f"there is no native step: {packed_native.load().reason}")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    library = packed_native.load().library
    assert library is not None
    if LEVELS.index(request.param) > LEVELS.index(library.best):
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(library, "level", LEVELS.index(request.param))
    yield request.param


def four_bits(name: str, kind: str) -> tuple[int, int]:
    return (8, 16) if kind in ("embedding", "head") else (4, 32)


def packed(folder: Path, kind: str, choose: Callable[[str, str], Any] = four_bits, **changes: Any) -> Any:
    pack_model(pico_model(kind, **changes), folder, choose)
    model = load_packed(folder)
    model.generation_config.eos_token_id = None
    return model


def eager(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([ids])).logits[0, -1].float()
    return found


def off(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.dtype == torch.float32
    difference = (found - wanted).abs().max() / wanted.abs().max()
    return float(difference.nan_to_num(nan=float("inf")))


def greedy(decoder: NativeDecoder, ids: list[int], count: int = NEW) -> list[int]:
    logits, new = decoder.prefill(ids), []
    for _ in range(count):
        new.append(int(logits.argmax()))
        logits = decoder.step(new[-1])
    return new


def check(model: Any, prompts: tuple[list[int], ...] = SOME, tight: float = TIGHT) -> None:
    """The same tokens as ``generate``, and the same logits behind the last of them."""
    assert why_not(model) is None
    decoder = NativeDecoder(model, 128)
    for prompt in prompts:
        decoder.truncate(0)
        new = greedy(decoder, prompt)
        with torch.inference_mode():
            wanted = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        assert prompt + new == wanted[0].tolist()
        assert decoder.length == len(prompt) + NEW
        decoder.truncate(decoder.length - 1)
        assert off(decoder.step(new[-1]), eager(model, prompt + new)) < tight


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


def replaced(model: Any, name: str, made: Any) -> None:
    """Put a random packed matrix in a linear's place."""
    old = model.get_submodule(name)
    module = PackedLinear(layout(made), old.bias is not None)
    module.load_parts({key.rpartition(".")[2]: part for key, part in encode("m", made).items()})
    module.bias = old.bias
    model.set_submodule(name, module)


FORMS: dict[str, dict[str, Any]] = {
    "mixed widths": {},
    "an order": {"order": 1},
    "an order of groups": {"order": 16},
    "rotated": {"rotation": 16},
    "channels, rotated": {"channels": True, "rotation": 32},
    "everything": {"order": 4, "rotation": 16, "channels": True, "channel_scale": True},
    "ragged groups": {"group_size": 20, "channel_scale": True},
    "offsets": {"zero": "offset", "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("form", sorted(FORMS))
def test_every_form_of_a_matrix(form: str, alike: bool, tmp_path: Path) -> None:
    """Matrices behind one input share what they can of the input side, and nothing more."""
    model = packed(tmp_path / "m", "llama", attention_bias=True)
    for index, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, PackedLinear) and name != "lm_head":
            rows, columns = module.shape
            split = ((columns - 32, 1), (16, 3), (16, 5)) if alike or index % 3 else ((columns - 32, 2), (32, 4))
            seed = 0 if alike else index % 2
            options = {"group_size": 16, **FORMS[form], "seed": seed}
            if not alike and index % 5 == 0:
                options["group_size"] = 32
            replaced(model, name, matrix(rows, split, **options))
    check(model, PROMPTS[2:3])
    with int8():
        decoder = NativeDecoder(model, 64)
        assert off(decoder.prefill(PROMPTS[1]), eager(model, PROMPTS[1])) < 0.02


def test_a_rotated_embedding(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama")
    made = matrix(VOCAB, ((48, 4),), rotation=16, channels=True, group_size=16)
    embedding = model.model.embed_tokens
    embedding.attach(layout(made))
    embedding.load_parts({key.rpartition(".")[2]: part for key, part in encode("m", made).items()})
    check(model, PROMPTS[2:3])


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
    with pytest.raises(InputError, match="holds none"):
        NativeDecoder(model, 0)


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

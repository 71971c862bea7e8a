"""Every form of a packed matrix in the native step, and what matrices behind one input share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_cases import PROMPTS, check, eager, need_kernels, off, packed
from packed_cases import matrix
from pico import VOCAB

from bitfloor.core.packed import PackedWeight
from bitfloor.formats.native import encode, layout
from bitfloor.ops.backend import int8
from bitfloor.ops.decoder_native import NOTHING, ROUNDED, ROW, STORED, shared_with
from bitfloor.runtime.linear import PackedLinear
from bitfloor.runtime.native_parts import read_model
from bitfloor.runtime.native_step import NativeDecoder


@pytest.fixture(autouse=True)
def kernels() -> None:
    need_kernels()


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


def like(first: PackedWeight, rows: int, change: str) -> PackedWeight:
    """A matrix behind the same input side as another, but for one thing."""
    groups = {"group size": 32}.get(change, 16)
    bits = ((32, 3), (16, 4)) if change == "width" else ((32, 2), (16, 4))
    made = matrix(rows, bits, group_size=groups, order=4, rotation=16, channels=True, channel_scale=True, seed=7)
    segments = [
        replace(own, channel_scale=own.channel_scale if change == "channel scale" else other.channel_scale)
        for own, other in zip(made.segments, first.segments, strict=True)
    ]
    return replace(
        made,
        segments=tuple(segments),
        order=made.order if change == "order" else first.order,
        channels=made.channels if change == "channels" else first.channels,
        rotation=32 if change == "rotation" else first.rotation,
    )


SHARED = {
    "nothing": ROUNDED,
    "group size": STORED,
    "width": STORED,
    "channel scale": ROW,
    "order": ROW,
    "channels": NOTHING,
    "rotation": NOTHING,
}


@pytest.mark.parametrize("change", sorted(SHARED))
def test_what_is_alike_is_done_once_and_nothing_else(change: str, tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama")
    first = matrix(48, ((32, 2), (16, 4)), group_size=16, order=4, rotation=16, channels=True, channel_scale=True)
    for index in range(3):
        name = f"model.layers.{index}.self_attn"
        replaced(model, f"{name}.q_proj", first)
        replaced(model, f"{name}.k_proj", like(first, 24, change))
        replaced(model, f"{name}.v_proj", like(first, 24, change))
        attention = read_model(model).layers[index]
        assert shared_with(attention.k, attention.q) == SHARED[change]
        assert shared_with(attention.v, attention.k) == ROUNDED
    check(model, PROMPTS[2:3])
    with int8():
        assert off(NativeDecoder(model, 64).prefill(PROMPTS[1]), eager(model, PROMPTS[1])) < 1e-3


def test_a_rotated_embedding(tmp_path: Path) -> None:
    model = packed(tmp_path / "m", "llama")
    made = matrix(VOCAB, ((48, 4),), rotation=16, channels=True, group_size=16)
    embedding = model.model.embed_tokens
    embedding.attach(layout(made))
    embedding.load_parts({key.rpartition(".")[2]: part for key, part in encode("m", made).items()})
    check(model, PROMPTS[2:3])

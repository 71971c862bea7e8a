"""Packed pico models in the native step, and transformers beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import pack_model
from pico import pico_model
from torch import Tensor

from bitfloor._plugin import register_with_transformers
from bitfloor.ops import packed_native
from bitfloor.runtime.hf import load_packed
from bitfloor.runtime.native_step import NativeDecoder, why_not

register_with_transformers()

PROMPTS = ([5], [7, 99, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 11, 12, 13], list(range(20, 90)))
NEW = 32
TIGHT = 1e-4  # of the largest logit: float32 sums in other orders in three layers; a lost bias gives more than 0.05
SOME = (PROMPTS[0], PROMPTS[2])  # of one token, and of more than go through the products for few rows


def need_kernels() -> None:
    """Skip a test where there is no native step."""
    if packed_native.load().library is None:
        pytest.skip(f"there is no native step: {packed_native.load().reason}")


def four_bits(name: str, kind: str) -> tuple[int, int]:
    """Width and group size of a matrix."""
    return (8, 16) if kind in ("embedding", "head") else (4, 32)


def packed(folder: Path, kind: str, choose: Callable[[str, str], Any] = four_bits, **changes: Any) -> Any:
    """A pico model, packed and loaded; it ends no text."""
    pack_model(pico_model(kind, **changes), folder, choose)
    model = load_packed(folder)
    model.generation_config.eos_token_id = None
    return model


def eager(model: Any, ids: list[int]) -> Tensor:
    """Logits of transformers behind the last token."""
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([ids])).logits[0, -1].float()
    return found


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a part of the largest logit."""
    assert found.shape == wanted.shape and found.dtype == torch.float32
    difference = (found - wanted).abs().max() / wanted.abs().max()
    return float(difference.nan_to_num(nan=float("inf")))


def greedy(decoder: NativeDecoder, ids: list[int], count: int = NEW) -> list[int]:
    """Tokens that the native step makes."""
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

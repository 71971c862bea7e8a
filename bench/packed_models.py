"""Packed Llama checkpoints with random weights, of any shape: models to measure memory and speed of running on.

Stored tensors are drawn directly, so a model of seven billion weights is made in the memory of one tensor. What it
says is noise; what it takes to run does not depend on that. Scales are such that activations stay finite.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import synthetic

ENDS = 6  # bits of embedding and head, about what llama.cpp gives its output
SALIENT, MULTIPLE = 0.2, 32


@dataclass(frozen=True)
class Storage:
    """How the linear weights are stored.

    Args:
        bits: width, of the salient channels where there are any.
        group_size: columns; 0 for whole rows.
        zero: of the format.
        salient: a fifth of the channels has ``bits``, the others one bit with factors of rows and columns (PTQ1.61).
    """

    bits: int
    group_size: int
    zero: str = "packed"
    salient: bool = False


STORAGES = {
    "w4g128": Storage(4, 128),
    "w3g128": Storage(3, 128),
    "w2g64": Storage(2, 64, "centre"),
    "w1.61": Storage(4, 0, salient=True),
}


def layout_of(shape: tuple[int, int], storage: Storage, kind: str = "linear") -> dict[str, Any]:
    """The layout of a matrix, as the format has it."""

    def segment(columns: int, bits: int, zero: str | None) -> dict[str, Any]:
        size = storage.group_size or columns
        shifted = zero is None
        return {
            "columns": columns,
            "bits": bits,
            "group_size": size,
            "zero": zero,
            "offset": shifted,
            "channel_scale": shifted,
        }

    segments, order = [segment(shape[1], storage.bits, storage.zero)], None
    if storage.salient:
        high = int(SALIENT * shape[1])
        high = high // MULTIPLE * MULTIPLE or high
        segments = [segment(high, storage.bits, storage.zero), segment(shape[1] - high, 1, None)]
        order = {"unit": 1, "count": shape[1]}
    return {
        "shape": list(shape),
        "kind": kind,
        "transposed": False,
        "scale_dtype": "float16",
        "segments": segments,
        "order": order,
    }


def matrices_of(shape: synthetic.Shape, vocabulary: int, storage: Storage) -> dict[str, dict[str, Any]]:
    """Matrix name to layout: embedding, head, and seven a layer."""
    ends = Storage(ENDS, 64)
    found = {
        "model.embed_tokens": layout_of((vocabulary, shape.hidden), ends, "embedding"),
        "lm_head": layout_of((vocabulary, shape.hidden), ends, "head"),
    }
    for k in range(shape.layers):
        for part in "qkvo":
            found[f"model.layers.{k}.self_attn.{part}_proj"] = layout_of((shape.hidden, shape.hidden), storage)
        for part in ("gate", "up"):
            found[f"model.layers.{k}.mlp.{part}_proj"] = layout_of((shape.intermediate, shape.hidden), storage)
        found[f"model.layers.{k}.mlp.down_proj"] = layout_of((shape.hidden, shape.intermediate), storage)
    return found


def orders_of(matrices: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Matrices whose order another one of the same input stores."""
    owners = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj"}
    owners |= {"mlp.up_proj": "mlp.gate_proj"}
    return {
        name: name.replace(part, owner)
        for name, layout in matrices.items()
        for part, owner in owners.items()
        if layout["order"] is not None and name.endswith(part)
    }


def build(folder: Path, shape: synthetic.Shape, storage: Storage, vocabulary: int = 32_000, seed: int = 0) -> int:
    """Write a packed checkpoint and return the bytes of its tensors.

    Args:
        folder: made if need be.
        shape: of the model; its head is a matrix of its own.
        storage: of the matrices of its layers.
        vocabulary: rows of embedding and head; more than the tokenizer's bytes are never said.
        seed: of the weights.
    """
    import torch

    from bitfloor.formats.layout import build_config
    from bitfloor.formats.shards import CheckpointWriter

    writer = CheckpointWriter(folder)
    synthetic.write_tokenizer(folder)
    matrices = matrices_of(shape, vocabulary, storage)
    kept = ["model.norm.weight"]
    kept += [f"model.layers.{k}.{n}.weight" for k in range(shape.layers) for n in NORMS]
    config = build_config(matrices, orders=orders_of(matrices), kept=kept)
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for name, layout in matrices.items():
        for tensor, dtype, sizes in config.tensors_of(name):
            part, bits = tensor.rpartition(".")[2], layout["segments"][0]["bits"]
            make = _maker(part, dtype, sizes, (layout["shape"][1], bits), generator)
            writer.add_later(tensor, dtype, sizes, make)
            total += torch.tensor(sizes).prod().item() * (1 if dtype == "U8" else 2)
    for name in kept:
        writer.add_later(name, "F16", (shape.hidden,), lambda: torch.ones(shape.hidden, dtype=torch.float16))
    writer.write()
    writer.finish(synthetic.config_of(shape, vocabulary, tied=False) | {"quantization_config": config.to_dict()})
    return int(total)


NORMS = ("input_layernorm", "post_attention_layernorm")


def _maker(part: str, dtype: str, sizes: tuple[int, ...], of: tuple[int, int], generator: Any) -> Callable[[], Any]:
    """What draws one stored tensor, of a matrix with so many columns and bits, when it is written."""
    import torch

    columns, bits = of

    def make() -> Any:
        if part == "order":
            return torch.randperm(columns, generator=generator).to(torch.uint8 if dtype == "U8" else torch.uint16)
        if part in ("codes", "zero"):
            return torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8)
        drawn = torch.rand(sizes, generator=generator)
        if part == "channel_scale":
            return (drawn + 0.5).half()
        return ((drawn - 0.5 if part == "offset" else drawn + 0.5) * 2.0 / (2**bits * columns**0.5)).half()

    return make


def describe(folder: Path) -> dict[str, Any]:
    """Bytes of a packed checkpoint by what they are for: linear weights, embedding, head, the rest."""
    found = {"linears": 0, "embedding": 0, "head": 0, "other": 0}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            kind = "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else "linears"
            found["other" if "norm" in name else kind] += last - first
    return found

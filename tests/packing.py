"""Small packed matrices and checkpoints for tests: min-max rounding through core, nothing of the real pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfloor.core.packed import PackedWeight, Segment, centre, pack_segment
from bitfloor.formats.layout import NativeConfig, build_config
from bitfloor.formats.native import encode, layout
from bitfloor.formats.shards import CheckpointWriter


def rtn(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype = torch.float16) -> PackedWeight:
    """Min-max round to nearest, one segment, packed zero-points (an offset at one bit)."""
    rows, columns = weight.shape
    group_size = min(group_size, columns)
    groups = -(-columns // group_size)
    padded = nn.functional.pad(weight.float(), (0, groups * group_size - columns), value=float("nan"))
    parts = padded.view(rows, groups, group_size)
    low = parts.nan_to_num(nan=float("inf")).amin(-1)
    high = parts.nan_to_num(nan=float("-inf")).amax(-1)
    top = 2**bits - 1
    scale = ((high - low).clamp_min(1e-4) / top).to(dtype)
    zero = (-low / scale.float()).round().clamp(0, top)
    spread = scale.float().repeat_interleave(group_size, 1)[:, :columns]
    if bits == 1:
        offset = low.to(dtype)
        shift = offset.float().repeat_interleave(group_size, 1)[:, :columns]
        codes = ((weight - shift) / spread).round().clamp(0, top).to(torch.uint8)
        segment = pack_segment(codes, scale, bits=bits, group_size=group_size, offset=offset)
    else:
        base = zero.repeat_interleave(group_size, 1)[:, :columns]
        codes = ((weight / spread).round() + base).clamp(0, top).to(torch.uint8)
        segment = pack_segment(codes, scale, bits=bits, group_size=group_size, zero=zero.to(torch.uint8))
    return PackedWeight((rows, columns), (segment,))


def random_segment(
    generator: torch.Generator,
    rows: int,
    columns: int,
    bits: int,
    *,
    start: int = 0,
    group_size: int = 16,
    zero: str | int = "packed",
    channel_scale: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Segment:
    """Random codes and scales, some negative. ``zero`` is ``"packed"``, ``"centre"``, ``"offset"`` or a constant."""
    groups = -(-columns // group_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    named = {"packed": zeros, "centre": centre(bits), "offset": None}
    return pack_segment(
        codes,
        normal(rows, groups),
        bits=bits,
        group_size=group_size,
        start=start,
        zero=named[zero] if isinstance(zero, str) else zero,
        offset=normal(rows, groups) if zero == "offset" else None,
        channel_scale=normal(columns) if channel_scale else None,
    )


def pack_model(model: Any, folder: Path, choose: Callable[[str, str], tuple[int, int] | None]) -> NativeConfig:
    """Write a transformers model as a native checkpoint.

    Args:
        model: float model; unchanged.
        folder: output.
        choose: ``(matrix name, kind)`` to ``(bits, group size)``, or None to keep the matrix as it is.
    """
    writer = CheckpointWriter(folder)
    layouts: dict[str, Any] = {}
    gone: set[str] = set()
    for name, kind, param, weight, transposed in _matrices(model):
        spec = choose(name, kind)
        if spec is None:
            continue
        packed = rtn(weight.T if transposed else weight, *spec)
        layouts[name] = layout(packed, kind, transposed)
        gone.add(param)
        for tensor_name, tensor in encode(name, packed).items():
            writer.add_tensor(tensor_name, tensor)
    tied = dict(model.all_tied_weights_keys)
    kept = [name for name in model.state_dict() if name not in gone and name not in tied]
    for name in kept:
        writer.add_tensor(name, model.state_dict()[name])
    recipe = {"name": "test", "sha256": hashlib.sha256().hexdigest()}
    config = build_config(layouts, tied=tied, kept=kept, recipe=recipe)
    writer.write()
    model.generation_config.save_pretrained(folder)
    writer.finish({**json.loads(model.config.to_json_string(use_diff=False)), "quantization_config": config.to_dict()})
    return config


def _matrices(model: Any) -> list[tuple[str, str, str, Tensor, bool]]:
    found: list[tuple[str, str, str, Tensor, bool]] = []
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is model.get_input_embeddings():
            found.append((name, "embedding", f"{name}.weight", module.weight.detach(), False))
        elif isinstance(module, nn.Linear):
            kind = "head" if module is head else "linear"
            if f"{name}.weight" not in model.all_tied_weights_keys:
                found.append((name, kind, f"{name}.weight", module.weight.detach(), False))
        elif type(module).__name__ == "Conv1D":
            found.append((name, "conv1d", f"{name}.weight", module.weight.detach(), True))
        elif type(module).__name__.endswith("Experts"):
            for param in ("gate_up_proj", "down_proj"):
                stack = getattr(module, param).detach()
                flip = bool(getattr(module, "is_transposed", False))
                for index in range(stack.shape[0]):
                    found.append((f"{name}.{index}.{param}", "expert", f"{name}.{param}", stack[index], flip))
    return found

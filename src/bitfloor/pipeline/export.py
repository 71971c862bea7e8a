"""Quantized checkpoints in forms that other software loads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.core.headers import CONFIG
from bitfloor.core.packed import dequantize
from bitfloor.formats import native
from bitfloor.formats.atomic import make_folder, write_json
from bitfloor.formats.checkpoint import Checkpoint, read_checkpoint
from bitfloor.formats.files import TORCH_DTYPES, read_tensor, write_artifact
from bitfloor.formats.layout import announce_version
from bitfloor.formats.shards import CheckpointWriter
from bitfloor.formats.verify import verify_checkpoint
from bitfloor.modeling.skeleton import build_skeleton, load_config
from bitfloor.pipeline.folder import copy_companions

PARTS = ".bitfloor-export"


def export_dense(folder: Path, out: Path) -> dict[str, Any]:
    """Write the dequantized weights as an ordinary float checkpoint, under the model's own parameter names.

    Matrices are dequantized in float32 and cast once to the dtype ``config.json`` names; experts are put back into
    their stacks. One parameter is in memory at a time.

    Args:
        folder: a native checkpoint.
        out: a new or empty folder.

    Raises:
        InputError: not a native checkpoint, one whose configuration is of another model, or ``out`` holds something.
        BitfloorError: the disk is full.
    """
    checkpoint = read_checkpoint(folder)
    announce_version(checkpoint.native)
    verify_checkpoint(checkpoint)
    if out.exists() and (not out.is_dir() or any(path.name != PARTS for path in out.iterdir())):
        raise InputError(f"{out} is not an empty folder; choose a new one for the export.")
    dtype = _dtype(checkpoint)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    _check_model(checkpoint, config)
    make_folder(out)
    parts = make_folder(out / PARTS)
    writer = CheckpointWriter(out)
    try:
        count = 0
        for parameter, matrices in _parameters(checkpoint).items():
            path = parts / f"{count:06d}.safetensors"
            write_artifact(path, {parameter: _dense(checkpoint, matrices, dtype)})
            writer.add_artifact(path)
            count += 1
        for name in checkpoint.native.kept:
            writer.add_from_file(name, checkpoint.tensors[name][0], name)
            count += 1
        writer.write()
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    copy_companions(folder, out)
    writer.finish(config)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {"format": "dense", "path": str(out), "bytes": size, "tensors": count}


def _check_model(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Build the model that the configuration describes, without weights, and compare its parameters with those here.

    A model that brings its own code is not built: its code is not run for an export.

    Raises:
        InputError: it has other parameters: an export would be a folder that nothing loads.
    """
    if "auto_map" in config:
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / CONFIG, config)
        model = build_skeleton(load_config(Path(scratch)))
    shapes = {name: checkpoint.tensors[name][1].shape for name in checkpoint.native.kept}
    for parameter, matrices in _parameters(checkpoint).items():
        layout = checkpoint.native.layout_of(matrices[0])
        shape = tuple(reversed(layout["shape"])) if layout["transposed"] else tuple(layout["shape"])
        shapes[parameter] = (len(matrices), *shape) if layout["kind"] == "expert" else shape
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for name in sorted({*shapes, *wanted} - (tied - set(shapes))):
        if shapes.get(name) != wanted.get(name):
            there, asked = (list(found[name]) if name in found else "missing" for found in (shapes, wanted))
            raise InputError(
                f"{checkpoint.folder / CONFIG} is of another model: {name} is {there} in the checkpoint and {asked} in "
                "the model that it describes; copy the folder again."
            )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or dtype not in TORCH_DTYPES.values() or not dtype.is_floating_point:
        raise InputError(f"config.json names the dtype {name!r}, which cannot hold weights; correct it.")
    return dtype


def _parameters(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Parameter name to the matrices it consists of: one, or the experts of a stack in order."""
    found: dict[str, list[str]] = {}
    for name in checkpoint.native.matrices:
        if checkpoint.native.layout_of(name)["kind"] == "expert":
            path, index, *rest = _expert_name(name)
            found.setdefault(".".join([path, *rest]), []).append(name)
            del index
        else:
            found[f"{name}.weight"] = [name]
    return {
        parameter: sorted(names, key=lambda name: int(_expert_name(name)[1])) if len(names) > 1 else names
        for parameter, names in found.items()
    }


def _expert_name(name: str) -> list[str]:
    """``"a.experts.3.gate_up_proj"`` as ``["a.experts", "3", "gate_up_proj"]``."""
    parts = name.split(".")
    at = max(i for i, part in enumerate(parts) if part.isdecimal())
    return [".".join(parts[:at]), parts[at], *parts[at + 1 :]]


def _dense(checkpoint: Checkpoint, matrices: list[str], dtype: torch.dtype) -> Tensor:
    def get(name: str) -> Tensor:
        file, entry = checkpoint.tensors[name]
        return read_tensor(file, entry)

    made = []
    for name in matrices:
        layout = checkpoint.native.layout_of(name)
        weight = dequantize(native.decode(name, layout, get, checkpoint.native.orders.get(name)), dtype)
        made.append(weight.t().contiguous() if layout["transposed"] else weight)
    stacked = checkpoint.native.layout_of(matrices[0])["kind"] == "expert"
    return torch.stack(made) if stacked else made[0]

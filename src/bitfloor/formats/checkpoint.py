"""A native checkpoint on disk, checked by its headers alone: every file there, every tensor as the config says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.core.headers import CONFIG, INDEX, TensorEntry, read_header
from bitfloor.formats.atomic import read_json
from bitfloor.formats.detect import Kind, detect
from bitfloor.formats.layout import NativeConfig, parse_config


@dataclass(frozen=True)
class Checkpoint:
    """A native checkpoint whose headers were read.

    Args:
        folder: where it lies.
        config: the whole of ``config.json``.
        native: its ``quantization_config``, checked.
        tensors: tensor name to ``(file, entry)``.
    """

    folder: Path
    config: dict[str, Any]
    native: NativeConfig
    tensors: dict[str, tuple[Path, TensorEntry]]

    def matrix_bytes(self, name: str) -> int:
        """Stored bytes under a matrix's own name (a shared order counts where it is stored)."""
        return sum(self.tensors[tensor][1].nbytes for tensor, _, _ in self.native.tensors_of(name))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; headers and other files not counted."""
        return sum(entry.nbytes for _, entry in self.tensors.values())


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read and check the configuration and all headers of a native checkpoint. No tensor is read, torch not needed.

    Raises:
        InputError: not a bitfloor checkpoint, another version, a shard missing or damaged, a tensor missing or of the
            wrong shape.
    """
    folder = Path(folder)
    found = detect(folder)
    if found.kind is not Kind.NATIVE:
        raise InputError(_not_native(folder, found.kind, found.detail))
    config = read_json(folder / CONFIG, strict=True)
    native = parse_config(config.get("quantization_config"))
    tensors = read_entries(shard_paths(folder))
    check_index(folder, tensors)
    check_tensors(native, tensors)
    check_accounting(folder, native, tensors)
    return Checkpoint(folder, config, native, tensors)


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a model folder, from its index or the single file.

    Raises:
        InputError: no weights, or a shard that the index names is not there.
    """
    if not (folder / INDEX).exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InputError(f"{folder} has a {CONFIG} but no weights (model.safetensors); copy the whole folder.")
        return [single]
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):  # nor a path that leads out of the folder
            raise InputError(f"{folder / INDEX} names {name!r}, which is no name of a shard; copy the folder again.")
        if not (folder / name).exists():
            raise InputError(f"{folder / name} is missing, although {INDEX} names it; copy the whole folder.")
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX, strict=True)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not (isinstance(found, dict) and found and all(isinstance(name, str) for name in found.values())):
        raise InputError(f"{folder / INDEX} has no weight_map; copy or download it again.")
    return found


def read_entries(paths: Iterable[str | os.PathLike[str]]) -> dict[str, tuple[Path, TensorEntry]]:
    """Tensor name to ``(file, entry)`` over several files.

    Raises:
        InputError: a damaged file, or a tensor that is in two files.
    """
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for path in map(Path, paths):
        for name, entry in read_header(path).tensors.items():
            if name in found:
                raise InputError(
                    f"tensor {name!r} is in {found[name][0].name} and in {path}; the shards are of two checkpoints, "
                    "copy the folder again."
                )
            found[name] = (path, entry)
    return found


def check_index(folder: Path, tensors: dict[str, tuple[Path, TensorEntry]]) -> None:
    """Compare the index of a folder, if it has one, with where tensors are.

    Raises:
        InputError: it names a tensor that is not there, or another file, or leaves one out.
    """
    if not (folder / INDEX).exists():
        return
    said, there = _weight_map(folder), {name: path.name for name, (path, _) in tensors.items()}
    if wrong := sorted(name for name in {*said, *there} if said.get(name) != there.get(name)):
        name = wrong[0]
        raise InputError(
            f"{folder / INDEX} has tensor {name!r} in {said.get(name, 'no file')} and it is in "
            f"{there.get(name, 'no file')}; the files are of two checkpoints, copy the folder again."
        )


def check_tensors(native: NativeConfig, tensors: dict[str, tuple[Path, TensorEntry]]) -> None:
    """Compare the tensors of the files with what the configuration promises.

    Raises:
        InputError: a tensor is missing, or its type or shape is another.
    """
    for matrix in native.matrices:
        for name, dtype, shape in native.tensors_of(matrix):
            if name not in tensors:
                raise InputError(f"tensor {name!r} is missing from the checkpoint's shards; copy the whole folder.")
            path, entry = tensors[name]
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise InputError(
                    f"tensor {name!r} in {path} is {entry.dtype} {list(entry.shape)} and the configuration says "
                    f"{dtype} {list(shape)}; copy the whole folder again."
                )
    for name in native.kept:
        if name not in tensors:
            raise InputError(f"tensor {name!r} is missing from the checkpoint's shards; copy the whole folder.")


def check_accounting(folder: Path, native: NativeConfig, tensors: Iterable[str]) -> None:
    """Refuse tensors that the configuration does not mention: nothing in a checkpoint is there by accident.

    Raises:
        InputError: a tensor is neither part of a packed matrix nor kept.
    """
    known = {name for matrix in native.matrices for name, _, _ in native.tensors_of(matrix)} | set(native.kept)
    if unknown := sorted(set(tensors) - known):
        raise InputError(
            f"tensor {unknown[0]!r} in {folder} is neither packed nor kept by its configuration; copy the folder again."
        )


def _not_native(folder: Path, kind: Kind, detail: str) -> str:
    match kind:
        case Kind.MISSING:
            return f"{folder} does not exist; give the folder that `bitfloor quantize --out` wrote."
        case Kind.FLOAT:
            return f"{folder} holds a float model, not a bitfloor checkpoint; quantize it first."
        case Kind.QUANTIZED:
            return f"{folder} holds a model quantized by {detail!r}, not by bitfloor; give a bitfloor checkpoint."
        case Kind.UNFINISHED:
            return f"{folder} has no {CONFIG}: it was not finished; run the same quantize command again to finish it."
        case _:
            return f"{folder} is not a bitfloor checkpoint; give the folder that `bitfloor quantize --out` wrote."

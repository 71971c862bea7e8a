"""Source weights on disk: which safetensors files there are, what their headers promise, and one tensor at a time.

Headers and tensors are read here rather than by the safetensors package for two reasons. A damaged file must become a
sentence that names the file and the byte, not a Rust error; and tensors must be read into fresh memory, because a
memory map that stays alive makes resident memory grow with every block that has been touched.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfloor.core import headers
from bitfloor.core.errors import BitfloorError, InputError

_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PIECE = 1 << 24

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the source checkpoint.

    Args:
        name: its name in the checkpoint.
        file: the shard that holds it.
        dtype, shape: as stored.
        start, stop: absolute byte offsets in ``file``.
        targets: the parameters (or persistent buffers) of the model it ends up in, one or several; filled by the
            loader.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    targets: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The first (nearly always only) parameter the tensor ends up in."""
        return self.targets[0]


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Find the shards of a checkpoint folder and read every header.

    Args:
        folder: a local checkpoint folder.

    Returns:
        source tensor name -> where and what it is, in file order.

    Raises:
        InputError: no weights, only pickled weights, a shard missing from the folder or from the index, or a damaged
            header.
    """
    index = folder / headers.INDEX
    if index.is_file():
        return _from_index(index)
    if (folder / _SINGLE).is_file():
        strays = sorted(p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name))
        if strays:
            raise InputError(
                f"{folder} holds {_SINGLE} and also the shard {strays[0]}; remove one of the two checkpoints."
            )
        return read_header(folder / _SINGLE)
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    if shards:
        raise InputError(
            f"{folder} holds {shards[0]} but no {headers.INDEX}; the index is needed to know that no shard is missing."
        )
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern) if p.name != "training_args.bin")
    if pickles:
        raise InputError(
            f"{folder / pickles[0]} is a pickle, which can run any code when opened; convert the model to "
            "safetensors first "
            "(save_pretrained writes it)."
        )
    raise InputError(f"{folder} has a config.json but no weights; {_SINGLE} or {headers.INDEX} is needed.")


def _from_index(index: Path) -> dict[str, TensorInfo]:
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensor names to files; download the checkpoint again.")
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name:
            raise InputError(f"{index} points outside its folder ({name}); a shard must lie beside the index.")
        if not (folder / name).is_file():
            raise InputError(f"{index} names the shard {name}, which is not there; download the checkpoint again.")
    for stray in sorted(p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name)):
        if stray not in files:
            raise InputError(
                f"the shard {folder / stray} is missing from {headers.INDEX}; download the checkpoint again."
            )
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        for key, info in read_header(folder / name).items():
            if weight_map.get(key) != name:
                raise InputError(
                    f"{folder / name} holds the tensor {key}, but {headers.INDEX} places it in {weight_map.get(key)}."
                )
            tensors[key] = info
    for key, name in weight_map.items():
        if key not in tensors:
            raise InputError(f"{headers.INDEX} places the tensor {key} in {name}, which does not hold it.")
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its checked header; the data is not touched.

    Raises:
        InputError: unreadable, truncated, or inconsistent file, or a type that cannot be weights, named.
    """
    tensors = {}
    for name, entry in headers.read_header(path).tensors.items():
        if entry.dtype not in _DTYPES:
            raise InputError(f"{path}: the tensor {name} has type {entry.dtype}, which bitfloor cannot read.")
        tensors[name] = TensorInfo(name, path, _DTYPES[entry.dtype], entry.shape, entry.start, entry.stop)
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor into fresh memory of its own; nothing stays open afterwards.

    Returns:
        a CPU tensor of ``info.dtype`` and ``info.shape``, aligned as torch aligns its allocations.

    Raises:
        BitfloorError: the file changed or vanished since its header was read.
    """
    data = torch.empty(info.shape, dtype=info.dtype)
    view = memoryview(data.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise BitfloorError(
                        f"{info.file} ended inside the tensor {info.name}; it changed while it was being read."
                    )
                done += count
    except OSError as error:
        raise BitfloorError(
            f"cannot read the tensor {info.name} from {info.file}: {error.strerror or error}."
        ) from error
    return data


def same_bytes(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two stored tensors are equal in dtype, shape and every byte; compared a piece at a time.

    Raises:
        BitfloorError: a file that cannot be read any more.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    size = a.stop - a.start
    try:
        with a.file.open("rb") as left, b.file.open("rb") as right:
            left.seek(a.start)
            right.seek(b.start)
            return all(
                left.read(min(_PIECE, size - at)) == right.read(min(_PIECE, size - at)) for at in range(0, size, _PIECE)
            )
    except OSError as error:
        raise BitfloorError(f"cannot compare the tensors {a.name} and {b.name}: {error.strerror or error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object, with the file named in every complaint.

    Raises:
        InputError: unreadable, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); download the file again.") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object; download the file again.")
    return data

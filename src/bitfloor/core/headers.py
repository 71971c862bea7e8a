"""The header of a safetensors file, without torch: names, types, shapes and where the bytes lie.

    8 bytes    length n of the header, unsigned little-endian
    n bytes    JSON, padded with spaces; {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {}}
    the rest   the data; offsets count from here and leave no hole

``bitfloor inspect`` reads nothing but headers, so this module must stay light to import.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitfloor.core.errors import InputError

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
ALIGNMENT = 64
METADATA = "__metadata__"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.tmp)?")
SHARD_CHECKSUM = "bitfloor.shard_sha256"  # in the metadata of a checkpoint's shard, see docs/format.md
NO_CHECKSUM = "0" * 64  # what stands there while it is computed
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library; a longer one is a corrupt length field


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Args:
        dtype: safetensors type name, a key of ``ITEM_BYTES``.
        shape: dimensions.
        start: first byte, counted from the beginning of the file.
        stop: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What the header of one file says: tensors by name (in the order of their bytes) and free text metadata."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of safetensors type ``dtype``."""
    return ITEM_BYTES[dtype] * prod(shape)


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The leading bytes of a file whose data holds ``tensors`` in the given order, padded to a multiple of 64.

    The keys of the JSON are sorted, so equal content gives equal bytes.

    Args:
        tensors: name to ``(dtype, shape)``, in the order in which the data follows.
        metadata: free text, stored under ``__metadata__``.
    """
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        stop = position + byte_count(dtype, shape)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: a table in which no key stands twice, of which a reader would drop one without a word.

    Raises:
        ValueError: one does.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file. Imports neither torch nor safetensors.

    Args:
        path: the file.

    Raises:
        InputError: the file cannot be read, is no safetensors file, or is shorter or longer than its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise InputError(
                    f"{path} is truncated or is not a safetensors file: it has {size} bytes and announces a header of "
                    f"{length}; copy or download it again."
                )
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path and its permissions.") from error
    try:
        content = json.loads(text, object_pairs_hook=unique_keys)
        metadata = {str(key): str(value) for key, value in content.pop(METADATA, {}).items()}
        tensors = {name: _entry(path, name, value, 8 + length) for name, value in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has a corrupt header ({error}); copy or download it again.") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_coverage(path, ordered, 8 + length, size)
    return Header(ordered, metadata)


def _entry(path: Path, name: str, value: dict[str, Any], data_start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    entry = TensorEntry(value["dtype"], tuple(int(n) for n in value["shape"]), data_start + begin, data_start + end)
    if entry.dtype not in ITEM_BYTES:
        raise InputError(f"{path}: the tensor {name} has type {entry.dtype}, which bitfloor cannot read.")
    if min(entry.shape, default=0) < 0 or entry.nbytes != byte_count(entry.dtype, entry.shape):
        raise ValueError(f"{name}: {entry.dtype} {list(entry.shape)} does not fill bytes {begin} to {end}")
    return entry


def _check_coverage(path: Path, tensors: dict[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in tensors.items():
        if entry.start != position:
            raise InputError(
                f"{path} has a corrupt header: tensor {name!r} begins at byte {entry.start}, not {position}; "
                "copy or download it again."
            )
        position = entry.stop
    if position != size:
        raise InputError(
            f"{path} has {size} bytes but its header describes {position}; it is truncated or damaged; "
            "copy or download it again."
        )

"""Tensor files: checksummed artefacts written from memory, and tensors read one at a time.

Every file bitfloor writes is a safetensors file that any reader of that format opens. Two things are added inside what
the format allows: the header is padded so that the data begins at a multiple of 64 bytes, and code tensors (whose sizes
are multiples of 64) come first, so every tile lies on a cache line. Reading uses plain file reads: no mapping stays
alive behind a tensor, and a file can be replaced or deleted while its tensors are in use.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.headers import ITEM_BYTES, Header, TensorEntry, build_header, read_header
from bitfloor.formats.atomic import atomic_file

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
CHECKSUM = "bitfloor.sha256"
CODES_SUFFIX = ".codes"
CHUNK_BYTES = 1 << 23


class CorruptArtifact(BitfloorError):
    """An artefact whose bytes are not those that were written; whoever finds one makes it again."""


def storage_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Names in the order in which their data is stored: codes first, then wide element types before narrow ones.

    Codes are multiples of 64 bytes, so each begins on a cache line; the rest stays aligned to its own element size.
    Names of equal rank keep their order.
    """
    return sorted(tensors, key=lambda name: 0 if name.endswith(CODES_SUFFIX) else 10 - ITEM_BYTES[tensors[name][0]])


def describe_tensor(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """``(safetensors type name, shape)`` of a tensor.

    Raises:
        BitfloorError: the dtype has no safetensors name.
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise BitfloorError(f"a tensor of type {tensor.dtype} cannot be stored; convert it first.")
    return DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, as they lie in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_artifact(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors to one file, atomically, with a checksum over header and data inside its header.

    Equal content gives equal bytes: there is no time, no host and no path in the file.

    Args:
        path: the file; its folder must exist.
        tensors: any names, shapes and types safetensors knows, on any device.
        metadata: free text to store with them.

    Returns:
        The checksum, 64 hexadecimal digits.

    Raises:
        InputError: no permission, a read-only disk, no such folder.
        BitfloorError: the disk is full.
    """
    described = {name: describe_tensor(tensor) for name, tensor in tensors.items()}
    ordered = {name: described[name] for name in storage_order(described)}
    digest = hashlib.sha256(build_header(ordered, metadata or {}))
    for name in ordered:
        digest.update(tensor_bytes(tensors[name]))
    checksum = digest.hexdigest()
    with atomic_file(path) as file:
        file.write(build_header(ordered, {**(metadata or {}), CHECKSUM: checksum}))
        for name in ordered:
            file.write(tensor_bytes(tensors[name]))
    return checksum


def read_artifact(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole artefact and check it.

    Returns:
        ``(tensors, metadata)`` as given to :func:`write_artifact`; tensors on the CPU.

    Raises:
        CorruptArtifact: cut off, changed, or not an artefact.
    """
    header, digest = _begin_check(path)
    tensors: dict[str, Tensor] = {}
    for name, entry in header.tensors.items():
        data = bytearray(b"".join(read_chunks(path, entry)))
        digest.update(data)
        tensors[name] = _as_tensor(data, entry)
    _end_check(path, header, digest.hexdigest())
    return tensors, {key: value for key, value in header.metadata.items() if key != CHECKSUM}


def verify_artifact(path: str | os.PathLike[str]) -> Header:
    """Check an artefact without holding more than a few megabytes of it.

    Returns:
        Its header; ``metadata[CHECKSUM]`` is the checksum.

    Raises:
        CorruptArtifact: cut off, changed, or not an artefact.
    """
    header, digest = _begin_check(path)
    for entry in header.tensors.values():
        for chunk in read_chunks(path, entry):
            digest.update(chunk)
    _end_check(path, header, digest.hexdigest())
    return header


def _begin_check(path: str | os.PathLike[str]) -> tuple[Header, hashlib._Hash]:
    try:
        header = read_header(path)
    except InputError as error:
        raise CorruptArtifact(str(error)) from error
    described = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    metadata = {key: value for key, value in header.metadata.items() if key != CHECKSUM}
    return header, hashlib.sha256(build_header(described, metadata))


def _end_check(path: str | os.PathLike[str], header: Header, found: str) -> None:
    expected = header.metadata.get(CHECKSUM, "none")
    if found != expected:
        raise CorruptArtifact(
            f"{path} is damaged: its checksum is {found[:16]}… and should be {expected[:16]}…; "
            "delete it and run the command again."
        )


def read_chunks(path: str | os.PathLike[str], entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of one tensor of a file, a few megabytes at a time.

    Raises:
        InputError: the file cannot be read or ends early.
    """
    left = entry.nbytes
    try:
        with Path(path).open("rb") as file:
            file.seek(entry.start)
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise InputError(f"{path} ends {left} bytes too early; copy or download it again.")
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path and its permissions.") from error


def read_tensor(path: str | os.PathLike[str], entry: TensorEntry) -> Tensor:
    """One tensor of a safetensors file, on the CPU, in memory of its own.

    Raises:
        InputError: the file cannot be read or ends early.
    """
    return _as_tensor(bytearray(b"".join(read_chunks(path, entry))), entry)


def _as_tensor(data: bytearray, entry: TensorEntry) -> Tensor:
    dtype = TORCH_DTYPES[entry.dtype]
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(entry.shape)


class TensorFile:
    """The tensors of one safetensors file, read when asked for.

    Args:
        path: the file; its header is read and checked at once.

    Raises:
        InputError: not a readable, complete safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_header(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.header.tensors

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self.path, self.header.tensors[name])


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a safetensors file for reading tensors one at a time."""
    return TensorFile(path)

"""The checkpoint writer: tensors from many places into a few shards, holding a few megabytes at a time.

Nothing is written under its final name before it is complete, every shard is read back and compared tensor by tensor
with what was meant to be written, and ``config.json`` comes last: a folder without it is not a model. A shard carries a
checksum of itself (:mod:`bitfloor.formats.verify` compares it).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from bitfloor.core.errors import BitfloorError
from bitfloor.core.headers import (
    CONFIG,
    INDEX,
    NO_CHECKSUM,
    SHARD_CHECKSUM,
    WEIGHT_FILES,
    TensorEntry,
    build_header,
    byte_count,
    read_header,
)
from bitfloor.formats.atomic import TEMPORARY_SUFFIX, atomic_file, make_folder, storage_error, write_json
from bitfloor.formats.checkpoint import check_accounting, check_tensors, read_entries, shard_paths
from bitfloor.formats.files import describe_tensor, read_chunks, storage_order, tensor_bytes, verify_artifact
from bitfloor.formats.layout import parse_config

MAX_SHARD_BYTES = 2_000_000_000
FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_METADATA = {"format": "pt"}  # readers of Hugging Face folders ask for this


@dataclass(frozen=True)
class Pending:
    """A tensor that waits to be written: what it is, and how to get its bytes piece by piece."""

    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        return byte_count(self.dtype, self.shape)


class CheckpointWriter:
    """Collects tensors by name and writes them as the shards of a checkpoint folder.

    Args:
        folder: output folder, created if missing.
        max_shard_bytes: upper bound of one file; a single larger tensor gets a file of its own.

    Raises:
        InputError: the folder cannot be created.
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = make_folder(folder)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Pending] = {}

    def add_artifact(self, path: str | os.PathLike[str]) -> None:
        """Take over all tensors of an artefact, which is checked first.

        Raises:
            CorruptArtifact: the artefact is damaged.
        """
        for name, entry in verify_artifact(path).tensors.items():
            self._add(name, _from_file(path, entry))

    def add_from_file(self, name: str, path: str | os.PathLike[str], source_name: str) -> None:
        """Copy one tensor, unchanged, from any safetensors file (a kept tensor of the source model).

        Raises:
            InputError: the file is damaged or lacks the tensor.
        """
        tensors = read_header(path).tensors
        if source_name not in tensors:
            raise BitfloorError(f"{path} has no tensor {source_name!r}; check that the source did not change.")
        self._add(name, _from_file(path, tensors[source_name]))

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Add a tensor from memory; it is kept alive until the shards are written."""
        dtype, shape = describe_tensor(tensor)
        self._add(name, Pending(dtype, shape, lambda: (tensor_bytes(tensor),)))

    def add_later(self, name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        """Add a tensor that is made when it is written, and dropped then.

        Args:
            name, dtype, shape: what it will be, in the words of the format.
            make: makes it.
        """
        self._add(name, Pending(dtype, shape, lambda: (tensor_bytes(make()),)))

    def _add(self, name: str, pending: Pending) -> None:
        if name in self._pending:
            raise BitfloorError(f"two tensors are named {name!r}; each may be written once.")
        self._pending[name] = pending

    def plan(self) -> list[tuple[str, list[str]]]:
        """``(file name, tensor names in storage order)`` of every shard, without writing anything."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, pending in self._pending.items():
            needed = pending.nbytes + _header_share(name, pending.shape)
            if groups[-1] and size + needed > self.max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += needed
        described = {name: (pending.dtype, pending.shape) for name, pending in self._pending.items()}
        ordered = [storage_order({name: described[name] for name in group}) for group in groups]
        if len(ordered) == 1:
            return [("model.safetensors", ordered[0])]
        return [(f"model-{i + 1:05d}-of-{len(ordered):05d}.safetensors", names) for i, names in enumerate(ordered)]

    def write(self) -> dict[str, str]:
        """Write all shards and, for more than one, their index; verify each by reading it back.

        An old ``config.json`` is removed first and old shards last, so that the folder never passes for a model while
        it is half old and half new.

        Returns:
            File name to sha256 of the whole file.

        Raises:
            InputError: no permission, read-only disk.
            BitfloorError: the disk is full, or what was read back differs.
        """
        self._remove(CONFIG)
        plan = self.plan()
        written = {file_name: self._write_shard(file_name, names) for file_name, names in plan}
        keep = set(written)
        if len(plan) > 1:
            total = sum(pending.nbytes for pending in self._pending.values())
            weight_map = {name: file_name for file_name, names in plan for name in names}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            keep.add(INDEX)
        for old in sorted(self.folder.iterdir()):
            if WEIGHT_FILES.fullmatch(old.name) and old.name not in keep:
                self._remove(old.name)
        return written

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``: from here on the folder is a model. Call it after everything else is in place.

        Some source models do not say in which dtype they compute. Loaders then take that of the first tensor they see,
        which here would be that of a scale; so the dtype of the largest float tensor that was kept is written down.

        Args:
            config: the source model's configuration with ``quantization_config`` added.

        Raises:
            InputError: no permission, read-only disk; or the tensors written are not those the configuration names.
            BitfloorError: the disk is full.
        """
        content = dict(config)
        if "quantization_config" in content:
            native = parse_config(content["quantization_config"])
            written = read_entries(shard_paths(self.folder))
            check_tensors(native, written)
            check_accounting(self.folder, native, written)
        if content.get("dtype") is None and content.get("torch_dtype") is None:
            kept = [self._pending[name] for name in content.get("quantization_config", {}).get("kept", ())]
            floats = [pending for pending in kept if pending.dtype in FLOAT_NAMES]
            if floats:
                content["dtype"] = FLOAT_NAMES[max(floats, key=lambda pending: pending.nbytes).dtype]
        write_json(self.folder / CONFIG, content)

    def _remove(self, file_name: str) -> None:
        try:
            (self.folder / file_name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder / file_name) from error

    def _write_shard(self, file_name: str, names: list[str]) -> str:
        return write_shard(self.folder / file_name, {name: self._pending[name] for name in names}, SHARD_METADATA)


def write_shard(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> str:
    """Write one shard, atomically, with its checksum, and read it back before it has its name.

    Args:
        path: the file; one that is there is replaced.
        tensors: what to write, in the order of the data.
        metadata: of its header, the checksum not among it.

    Returns:
        sha256 of the whole file.

    Raises:
        InputError: no permission, read-only disk.
        BitfloorError: the disk is full, or what was read back differs.
    """
    described = {name: (pending.dtype, pending.shape) for name, pending in tensors.items()}
    header = build_header(described, {**metadata, SHARD_CHECKSUM: NO_CHECKSUM})
    whole = hashlib.sha256(header)
    expected: dict[str, str] = {}
    with atomic_file(path) as file:
        file.write(header)
        for name, pending in tensors.items():
            expected[name] = _copy(file, pending.chunks(), whole)
        file.seek(header.index(f'"{SHARD_CHECKSUM}":"{NO_CHECKSUM}"'.encode()) + len(SHARD_CHECKSUM) + 4)
        file.write(whole.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
        return _read_back(Path(file.name), described, expected, whole.hexdigest())


def rewrite_shard(source: Path, target: Path) -> str:
    """Write a shard anew as this version writes it: the same tensors in the same order, and a checksum.

    Args:
        source: a safetensors file.
        target: where to; may be the same file.

    Returns:
        sha256 of the whole new file.

    Raises:
        InputError, BitfloorError: as :func:`write_shard`; a damaged source.
    """
    header = read_header(source)
    metadata = {key: value for key, value in header.metadata.items() if key != SHARD_CHECKSUM}
    tensors = {name: _from_file(source, entry) for name, entry in header.tensors.items()}
    return write_shard(target, tensors, SHARD_METADATA | metadata)


def _from_file(path: str | os.PathLike[str], entry: TensorEntry) -> Pending:
    def chunks() -> Iterator[bytes]:
        return read_chunks(path, entry)

    return Pending(entry.dtype, entry.shape, chunks)


def _header_share(name: str, shape: tuple[int, ...]) -> int:
    """Upper bound of what one tensor adds to the JSON header: its name, fixed words, and 20 digits a number."""
    return 2 * len(name.encode()) + 64 + 21 * (len(shape) + 2)


def _copy(file: BinaryIO, chunks: Iterable[bytes | memoryview], whole: hashlib._Hash) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        file.write(chunk)
        digest.update(chunk)
        whole.update(chunk)
    return digest.hexdigest()


def _read_back(
    path: Path, described: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, str], checksum: str
) -> str:
    """Compare a written shard with what was meant to be in it, from the device where the system allows that.

    Returns:
        sha256 of the whole file.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file, suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    header = read_header(path)
    entries = header.tensors
    name_of = path.with_name(path.name.removesuffix(TEMPORARY_SUFFIX))
    if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != dict(described):
        raise BitfloorError(f"{name_of} does not contain the tensors that were written; check the disk and run again.")
    if header.metadata.get(SHARD_CHECKSUM) != checksum:
        raise BitfloorError(f"{name_of} does not have the checksum that was written; check the disk and run again.")
    with path.open("rb") as file:
        whole = hashlib.sha256(file.read(min((entry.start for entry in entries.values()), default=-1)))
    for name, entry in entries.items():
        digest = hashlib.sha256()
        for chunk in read_chunks(path, entry):
            digest.update(chunk)
            whole.update(chunk)
        if digest.hexdigest() != expected[name]:
            raise BitfloorError(
                f"tensor {name!r} read back from {name_of} differs from what was written; check the disk and run again."
            )
    return whole.hexdigest()

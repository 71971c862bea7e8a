"""Whether the bytes of a checkpoint are those that were written: checksums of shards, and indices that point somewhere.

The headers say that every tensor is there and of the right size (:mod:`bitfloor.formats.checkpoint`). A flipped bit in
the codes changes neither, and a model that was made from it runs and is wrong. So shards carry a checksum. Reads each
file once, a few megabytes at a time, without torch.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitfloor.core.channels import is_order
from bitfloor.core.errors import InputError
from bitfloor.core.headers import NO_CHECKSUM, SHARD_CHECKSUM, TensorEntry, read_header
from bitfloor.formats.checkpoint import Checkpoint
from bitfloor.formats.layout import FORMAT_VERSION, order_fault

CHUNK_BYTES = 1 << 23
ARRAYS = {1: "B", 2: "H", 4: "I"}  # item bytes to the type code of an array


@dataclass(frozen=True)
class Verified:
    """What was compared.

    Args:
        files: shards whose checksum is right, by name, to the sha256 of the whole file.
        without: shards that carry none: written by bitfloor before version 1, or by another program.
    """

    files: dict[str, str]
    without: tuple[str, ...]


def verify_checkpoint(checkpoint: Checkpoint, report: Mapping[str, str] | None = None) -> Verified:
    """Read all shards of a checkpoint and compare them with their checksums, and look at its stored indices.

    Args:
        checkpoint: one whose headers were checked.
        report: file name to sha256 of the whole file, from ``bitfloor.json``, where there is one.

    Raises:
        InputError: a file was changed since it was written; an order or channels that are none.
    """
    files, without = {}, []
    for path in sorted({path for path, _ in checkpoint.tensors.values()}):
        said, found, whole = shard_checksum(path)
        expected = report.get(path.name) if isinstance(report, Mapping) else None
        if said == found and checkpoint.native.version != FORMAT_VERSION:
            expected = None  # a migration in place was killed: the shard is new and the report is not
        if said not in (None, found) or expected not in (None, whole):
            raise InputError(
                f"{path} is damaged: its bytes are not those that were written (sha256 {found[:12]}…, and "
                f"{str(said if said not in (None, found) else expected or '')[:12]}… is expected); copy it again."
            )
        if said is None and expected is None:
            without.append(path.name)
        else:
            files[path.name] = whole
    check_indices(checkpoint)
    return Verified(files, tuple(without))


def shard_checksum(path: Path) -> tuple[str | None, str, str]:
    """The checksum that a shard carries, the one that it should carry, and the sha256 of the file as it is.

    Raises:
        InputError: the file cannot be read, or is no safetensors file.
    """
    header = read_header(path)
    said = header.metadata.get(SHARD_CHECKSUM)
    at = min((entry.start for entry in header.tensors.values()), default=path.stat().st_size)
    try:
        with path.open("rb") as file:
            begin = file.read(at)
            whole = hashlib.sha256(begin)
            blank = hashlib.sha256(begin.replace(said.encode(), NO_CHECKSUM.encode(), 1) if said else begin)
            while chunk := file.read(CHUNK_BYTES):
                whole.update(chunk)
                if said:
                    blank.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path and its permissions.") from error
    return said, blank.hexdigest() if said else whole.hexdigest(), whole.hexdigest()


def check_indices(checkpoint: Checkpoint) -> None:
    """Refuse stored orders and channels that do not name the input channels of their matrix.

    Raises:
        InputError: naming the tensor.
    """
    native = checkpoint.native
    for name in native.matrices:
        layout = native.layout_of(name)
        for tensor, _, _ in native.tensors_of(name):
            part, reason = tensor.removeprefix(f"{name}."), None
            if part == "order":
                reason = order_fault(layout, _entries(*checkpoint.tensors[tensor]))
            elif part == "channels" and not is_order(_entries(*checkpoint.tensors[tensor]), layout["shape"][1]):
                reason = f"is no order of its {layout['shape'][1]} input channels"
            if reason:
                raise InputError(f"{tensor} {reason}; copy the checkpoint again.")


def _entries(path: Path, entry: TensorEntry) -> array[int]:
    try:
        with path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.nbytes)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path and its permissions.") from error
    found: array[int] = array(ARRAYS[int(entry.dtype[1:]) // 8])
    found.frombytes(data)
    if sys.byteorder == "big":
        found.byteswap()
    return found

"""Files that exist whole or not at all, and what to say when the disk refuses.

A file is written under a temporary name beside its final one, flushed to the device, renamed, and the directory is
flushed too: after a power cut there is the old file or the new one. The temporary name is fixed (``NAME.tmp``), so what
a killed process left behind is overwritten by the next attempt and never piles up.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.headers import unique_keys

TEMPORARY_SUFFIX = ".tmp"


def storage_error(error: OSError, path: str | os.PathLike[str]) -> BitfloorError:
    """The sentence for a failed write of ``path``: an :class:`InputError` where another path or permission helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BitfloorError(
            f"the disk is full: {path} could not be written; free some space and run the same command again, "
            "finished work is kept."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError(f"no permission to write {path}; choose another output folder or change its permissions.")
    if error.errno == errno.EROFS:
        return InputError(f"{path} lies on a read-only file system; choose another output folder.")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST):
        return InputError(f"{path} cannot be written: {error.strerror}; check the output path.")
    return BitfloorError(f"writing {path} failed: {error.strerror or error}; check the disk and run the command again.")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents; a folder that is there is fine.

    Raises:
        InputError: no permission, a file in the way, a read-only disk.
        BitfloorError: the disk is full.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error
    return Path(path)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears under ``path`` only when the ``with`` block ends without an exception.

    Raises:
        InputError: no permission, a read-only disk, a path that cannot exist.
        BitfloorError: the disk is full, or another storage failure.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise


def sync_folder(path: Path) -> None:
    """Flush a directory, so that the names in it survive a power cut. File systems without this are left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON atomically with sorted keys, two spaces of indent and a final newline: equal content, equal bytes."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def read_json(path: str | os.PathLike[str], *, strict: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        strict: refuse a table in which a key stands twice.

    Raises:
        InputError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=unique_keys if strict else None)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the path and its permissions.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); copy or download it again.") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be read; copy or download it again.") from error

"""A checkpoint of an older format version as one of this version, on disk: the same tensors, new headers and config.

Killed at any moment nothing is lost. In a new folder, ``config.json`` comes last. In place, every file is replaced as a
whole, shards first, and a shard with a checksum is still one of version 0; so the folder is a checkpoint of the old
version until ``config.json`` is replaced, and one of the new version from then on. The same command continues.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.core.headers import CONFIG, INDEX
from bitfloor.formats.atomic import TEMPORARY_SUFFIX, atomic_file, make_folder, read_json, storage_error, write_json
from bitfloor.formats.checkpoint import Checkpoint, read_checkpoint
from bitfloor.formats.layout import FORMAT_VERSION
from bitfloor.formats.shards import rewrite_shard
from bitfloor.formats.verify import shard_checksum, verify_checkpoint
from bitfloor.pipeline.folder import REPORT, only_writer
from bitfloor.pipeline.journal import FOLDER

MARK = ".bitfloor-migration"  # in a new folder, until it is a checkpoint


def migrate_checkpoint(folder: Path, out: Path | None) -> dict[str, Any]:
    """Write a checkpoint in the format version of this bitfloor.

    Args:
        folder: the checkpoint.
        out: a folder that is new or empty, or what a killed migration of the same checkpoint left; None migrates in
            place.

    Returns:
        ``{"from", "to", "path", "files"}``: the versions, the folder, and the sha256 of every shard.

    Raises:
        InputError: not a checkpoint, a damaged one, one that is of this version already, or ``out`` holds something.
        BitfloorError: the disk is full, or does not store what is written.
    """
    checkpoint = read_checkpoint(folder)
    version = checkpoint.native.version
    if version == FORMAT_VERSION:
        raise InputError(f"{folder} is of format version {version} already; there is nothing to migrate.")
    target = out or folder
    if out is not None:
        _check_target(folder, out)
        make_folder(out)
        write_json(out / MARK, _origin(folder))
    with only_writer(target):
        files = _shards(checkpoint, target)
        if out is not None:
            _copy_rest(checkpoint, out)
        _report(folder, target, files)
        config = {**checkpoint.config, "quantization_config": checkpoint.native.to_dict()}
        write_json(target / CONFIG, config)
        (target / MARK).unlink(missing_ok=True)
        verify_checkpoint(read_checkpoint(target), files)
    return {"from": version, "to": FORMAT_VERSION, "path": str(target), "files": files}


def _check_target(folder: Path, out: Path) -> None:
    """Refuse a folder that holds anything but what a killed migration of ``folder`` could have left."""
    try:
        there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    except NotADirectoryError as error:
        raise InputError(f"{out} is a file; give a folder for the migrated checkpoint.") from error
    except OSError as error:
        raise storage_error(error, out) from error
    if out.resolve() == folder.resolve():
        raise InputError(f"{out} is the checkpoint itself; add --in-place instead of a second folder.")
    if folder.resolve() in out.resolve().parents:
        raise InputError(f"{out} lies inside the checkpoint; choose a folder elsewhere.")
    begun = MARK in there and read_json(out / MARK) == _origin(folder)
    foreign = [] if begun else sorted(set(there) - {MARK + TEMPORARY_SUFFIX}, key=lambda name: name != CONFIG)
    if foreign:
        raise InputError(
            f"{out} is not empty (it holds {foreign[0]!r}); choose a new folder for the migrated checkpoint."
        )


def _origin(folder: Path) -> dict[str, str]:
    """What a migration into another folder is known by while it is under way."""
    return {"config_sha256": hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()}


def _shards(checkpoint: Checkpoint, target: Path) -> dict[str, str]:
    """Write every shard to ``target`` with a checksum, after it was compared with what is known of it."""
    said = _stored_report(checkpoint.folder).get("files")
    said = said if isinstance(said, dict) else {}
    files = {}
    for path in sorted({path for path, _ in checkpoint.tensors.values()}):
        own, found, whole = shard_checksum(path)
        if own is None and said.get(path.name, whole) != whole or own not in (None, found):
            raise InputError(f"{path} is damaged: its bytes are not those that were written; copy it again.")
        done = own is not None and target == checkpoint.folder  # by a migration that was killed
        files[path.name] = whole if done else rewrite_shard(path, target / path.name)
    return files


def _copy_rest(checkpoint: Checkpoint, out: Path) -> None:
    """Copy all other files, the index of the shards among them; not the journal, report or configuration."""
    shards = {path.name for path, _ in checkpoint.tensors.values()}
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name in {CONFIG, REPORT, FOLDER, MARK, *shards} or path.name.endswith(TEMPORARY_SUFFIX):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
            continue
        with atomic_file(out / path.name) as file, path.open("rb") as source:
            shutil.copyfileobj(source, file)
    if (out / INDEX).exists() != (checkpoint.folder / INDEX).exists():
        raise InputError(f"{out / INDEX} is of another checkpoint; choose a new folder for the migrated one.")


def _stored_report(folder: Path) -> dict[str, Any]:
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    return report if isinstance(report, dict) else {}


def _report(folder: Path, target: Path, files: dict[str, str]) -> None:
    """The report, which holds the hashes of the shards; all else in it stays."""
    if (folder / REPORT).is_file():
        write_json(target / REPORT, {**_stored_report(folder), "files": files})

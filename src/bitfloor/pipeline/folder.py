"""The output folder: what may be in it, what the finished checkpoint consists of beside its weights."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.core.headers import INDEX
from bitfloor.formats.atomic import atomic_file, make_folder, read_json, storage_error
from bitfloor.pipeline.journal import FOLDER, is_journal

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

REPORT = "bitfloor.json"
PLAN_FILE = "plan.json"  # widths of all groups, where they differ
PROBE = ".bitfloor-probe"
# Files of a Hugging Face folder that are not weights and not code, copied as they are.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "spiece.model",
    "LICENSE*",
    "NOTICE*",
)


def finished_report(out: Path) -> dict[str, Any] | None:
    """The report of the complete checkpoint in a folder, or None if there is none."""
    if (out / "config.json").is_file() and (out / REPORT).is_file():
        report = read_json(out / REPORT)
        if not isinstance(report, dict):
            raise InputError(f"{out / REPORT} is damaged; copy the checkpoint again, or remove the folder.")
        return report if "made_from" in report else None
    return None


def prepare(out: Path, *, resume: bool) -> dict[str, Any] | None:
    """Make the output folder usable.

    Returns:
        The report of a complete checkpoint that is already there and may be kept, or None.

    Raises:
        InputError: it holds something else, or cannot be created or written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the quantized model.")
    try:
        names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise storage_error(error, out) from error
    entries = [name for name in names if not name.startswith(PROBE)]  # left behind by a run killed while probing
    report = finished_report(out)
    ours = is_journal(out / FOLDER) or report is not None
    if entries and not ours:
        raise InputError(
            f"{out} is not empty (it holds {entries[0]!r}) and is not a bitfloor run; choose a new or empty folder."
        )
    make_folder(out)
    with atomic_file(out / PROBE) as file:
        file.write(b"")
    (out / PROBE).unlink()
    return report if resume else None


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep a second run out of an output folder for as long as this one lives; a killed run leaves no lock behind.

    Raises:
        InputError: another run is writing there.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                yield  # a file system without locks
                return
            raise InputError(f"another run is writing to {out}; wait for it, or choose another folder.") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def own_spill(spill: Path | None, out: Path) -> Iterator[Path | None]:
    """A folder below ``spill`` for this run alone, named after its output folder; gone when the run has ended.

    What a killed run left there is removed first, so runs may share ``spill``: two of one output folder do not exist.

    Raises:
        InputError: it cannot be made.
    """
    if spill is None:
        yield None
        return
    own = spill / f"bitfloor-{hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:12]}"
    shutil.rmtree(own, ignore_errors=True)
    try:
        own.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make the spill folder {own}: {error.strerror}; give another one.") from error
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def clear_finished(out: Path) -> None:
    """Remove a finished checkpoint that is to be replaced, and nothing else; ``config.json`` goes first."""
    report = finished_report(out)
    if report is None:
        return
    shards = [*report.get("files", {}), INDEX]
    for name in ("config.json", *shards, *report.get("companions", ()), PLAN_FILE, REPORT):
        path = out / Path(name).name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path) from error


def damaged_file(out: Path, report: Mapping[str, Any]) -> str | None:
    """The first shard of a finished checkpoint that is missing or not as it was written, None if all are."""
    for name, expected in report.get("files", {}).items():
        try:
            with (out / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return str(name)
        if found != expected:
            return str(name)
    return None


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copy tokenizer, chat template, generation settings and licence; the names of what was copied."""
    copied = []
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in copied:
                with atomic_file(out / path.name) as target, path.open("rb") as file:
                    shutil.copyfileobj(file, target)
                copied.append(path.name)
    return copied


def model_config(source: Path, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The source's ``config.json`` with the quantization described in it."""
    config: dict[str, Any] = read_json(source / "config.json")
    return {**config, "quantization_config": dict(quantization)}

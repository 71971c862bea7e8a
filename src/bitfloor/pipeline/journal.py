"""The journal of a run: one checksummed file a block, and what they were made from.

    OUT/.bitfloor/run.json            the fingerprint of the run: recipe, model, data, device, threads, versions
    OUT/.bitfloor/block-00012.safetensors
    OUT/.bitfloor/plan.safetensors    the widths of all groups, where they were chosen before the first block
    OUT/.bitfloor/ends.safetensors    embedding, head and everything outside the blocks
    OUT/.bitfloor/tuning.safetensors, tuned.safetensors, tuned-*.safetensors
                                      what the last stage has learnt so far (replaced as it goes), its result, and the
                                      parts with it
    OUT/.bitfloor/first-*.safetensors, restoring.safetensors, adapters.safetensors, restored/, merged.safetensors
                                      where the model is restored between two quantizations: the parts of the first,
                                      what the adapters have learnt so far, their result, the float model with them,
                                      and its hash

A file appears under its name only when it is complete and on the device. Whatever a killed run leaves behind is either
such a file or a temporary one that the next attempt overwrites. A file that does not match its checksum is made again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.formats.atomic import make_folder, read_json, storage_error, write_json
from bitfloor.formats.files import CorruptArtifact, read_artifact, verify_artifact, write_artifact

FOLDER = ".bitfloor"
RUN = "run.json"
ENDS = "ends"
PLAN = "plan"  # widths of all groups, where they are chosen before the first block
TUNED, STATE = "tuned", "tuning"  # the result of the last stage, and what it has learnt so far
FIRST = "first-"  # before the parts of a first quantization, where there are two
RESTORING, ADAPTERS, MERGED = "restoring", "adapters", "merged"  # what adapters learn, have learnt, and what came of it
RESTORED = "restored"  # folder of the float model that the second quantization starts from
PARTS = re.compile(
    r"((tuned-|first-)?(block-\d{5}|ends)|(first-)?plan|tuned|tuning|restoring|adapters|merged)\.safetensors(\.tmp)?"
    r"|run\.json\.tmp|survey|restored"
)


@dataclass(frozen=True)
class Entry:
    """A finished part of the model.

    Args:
        tensors: what the checkpoint will hold of it.
        facts: layouts, errors, notes, seconds: plain data.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def is_journal(folder: Path) -> bool:
    """Whether a folder is a journal: one that was begun, or what is left of one that was being removed."""
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return RUN in names or all(PARTS.fullmatch(name) for name in names)


def part_name(block: int) -> str:
    """The journal's name of a block."""
    return f"block-{block:05d}"


def tuned_name(part: str) -> str:
    """The journal's name of a part after the last stage."""
    return f"tuned-{part}"


class Journal:
    """Finished parts of one run, in the output folder.

    Args:
        folder: the run's output folder, which exists.
        fingerprint: what decides the bytes of the result.
        prefix: before the names of all parts.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], prefix: str = "") -> None:
        self.folder = folder / FOLDER
        self.prefix = prefix
        self.fingerprint = dict(fingerprint)

    @property
    def first(self) -> Journal:
        """The parts of a first quantization, in the same folder."""
        return Journal(self.folder.parent, self.fingerprint, FIRST)

    def exists(self) -> bool:
        """Whether this very run was begun before: what it checked first need not be checked again."""
        run = self.folder / RUN
        return run.is_file() and not differences(self._begun(), self.fingerprint)

    def _begun(self) -> dict[str, Any]:
        try:
            found = read_json(self.folder / RUN)
        except InputError:
            found = None
        return found if isinstance(found, dict) else {"run.json": "damaged"}

    def begin(self, resume: bool) -> None:
        """Open the journal: continue the one that is there, or start one.

        Raises:
            InputError: there is one, of a run that would give other bytes; the message names what changed.
        """
        run = self.folder / RUN
        if not resume and self.folder.exists():
            _remove(self.folder)
        if run.exists():
            changed = differences(self._begun(), self.fingerprint)
            if changed:
                raise InputError(
                    f"{self.folder.parent} holds an unfinished run that was started differently: {changed}. "
                    "Repeat the original command to resume it, or add --no-resume to start over."
                )
            return
        if self.folder.exists():  # parts without run.json: killed while removing a journal, of what run is not known
            _remove(self.folder)
        make_folder(self.folder)
        write_json(run, self.fingerprint)

    def path(self, part: str) -> Path:
        """Where a part is, or will be, stored."""
        return self.folder / f"{self.prefix}{part}.safetensors"

    def facts(self, part: str) -> dict[str, Any] | None:
        """The facts of a finished part without its tensors; None if it is missing or damaged (then it is removed)."""
        path = self.path(part)
        if not path.exists():
            return None
        try:
            metadata = verify_artifact(path).metadata
        except CorruptArtifact:
            path.unlink()
            return None
        return _facts(metadata)

    def get(self, part: str) -> Entry:
        """A finished part.

        Raises:
            CorruptArtifact: the file changed since it was last checked.
        """
        tensors, metadata = read_artifact(self.path(part))
        return Entry(tensors, _facts(metadata))

    def put(self, part: str, entry: Entry) -> None:
        """Store a finished part; from here on the run need not do it again."""
        write_artifact(self.path(part), entry.tensors, {"facts": json.dumps(entry.facts, sort_keys=True)})

    def close(self) -> None:
        """Remove the journal: the checkpoint is complete."""
        _remove(self.folder)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise storage_error(error, folder) from error


def _facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return facts


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, as a phrase; empty when nothing does."""
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return "; ".join(
        f"{key.replace('_', ' ')} was {_shown(old.get(key))} and is now {_shown(new.get(key))}" for key in keys
    )


def _shown(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text  # a hash is recognised by its beginning

"""The report that a run leaves in its folder, checked before anything is read from it: it is a file like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.formats.atomic import read_json

REPORT = "bitfloor.json"

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _course(value: Any) -> bool:
    """How learning went: losses before and after, and the step that was kept."""
    return isinstance(value, Mapping) and all(_number(value.get(key)) for key in ("before", "after", "step"))


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _table(check: Check) -> Check:
    return lambda value: isinstance(value, Mapping) and all(check(entry) for entry in value.values())


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _facts(value: Any) -> bool:
    """What a run knows of one matrix."""
    checks = {"block_error": _maybe(_number), "learning": _maybe(_course), "note": _maybe(_text)}
    return isinstance(value, Mapping) and all(check(value.get(key)) for key, check in checks.items())


# What a reader uses. Keys that are missing are facts that are not known; others are for other readers.
CHECKS: Mapping[str, tuple[Check, str]] = {
    "recipe": (_mapping, "an object"),
    "bytes": (_table(_number), "an object of numbers"),
    "files": (_table(_text), "an object of file names and checksums"),
    "made_from": (_mapping, "an object"),
    "matrices": (_table(_facts), "an object of what is known of every matrix"),
    "kept": (_mapping, "an object of names and reasons"),
    "allocation": (_maybe(_mapping), "null or an object"),
    "tuning": (_maybe(_course), "null, or an object with before, after and step"),
    "restoration": (_maybe(_course), "null, or an object with before, after and step"),
}


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a quantized folder; empty if there is none.

    Args:
        folder: the folder that was written.

    Raises:
        InputError: the file is no JSON, or a part of it that is read is not what a run writes.
    """
    path = folder / REPORT
    if not path.is_file():
        return {}
    report = read_json(path)
    if not isinstance(report, dict):
        raise InputError(f"{path} is no JSON object; copy the folder again, or delete the file.")
    for key, (check, wanted) in CHECKS.items():
        if key in report and not check(report[key]):
            raise InputError(f"{path}: {key} must be {wanted}; copy the folder again, or delete the file.")
    return report

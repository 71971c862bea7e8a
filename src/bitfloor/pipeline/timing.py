"""How long a run took, kept outside its output folder.

The same command must give the same bytes, and times never repeat. So they are kept in the user's cache folder under a
hash of what the checkpoint was made from, where ``bitfloor inspect`` finds them again. Losing them loses nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitfloor.core.errors import BitfloorError
from bitfloor.core.places import cache_folder
from bitfloor.formats.atomic import make_folder, read_json, write_json


def _path(made_from: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "runs" / f"{digest[:32]}.json"


def remember(made_from: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Store the seconds spent on every matrix; a cache that cannot be written is no reason to fail a run."""
    with suppress(BitfloorError):
        make_folder(_path(made_from).parent)
        write_json(_path(made_from), {"seconds": dict(seconds)})


def recall(made_from: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by matrix of the last run that made this checkpoint here; empty if none is known."""
    try:
        found = read_json(_path(made_from))["seconds"]
        return {str(name): float(value) for name, value in found.items()}
    except (BitfloorError, KeyError, TypeError, ValueError, AttributeError):
        return {}

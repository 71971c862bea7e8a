"""Where bitfloor keeps what is not a result: dequantized GGUF models and the timings of runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``BITFLOOR_CACHE``, or ``~/.cache/bitfloor``. It need not exist, and may be deleted at any time."""
    named = os.environ.get("BITFLOOR_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "bitfloor"

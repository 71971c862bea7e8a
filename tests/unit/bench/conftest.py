"""The scripts of ``bench`` are programs, not a package: tests import them as the programs import each other."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[3] / "bench"

if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

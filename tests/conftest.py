"""What holds for every test: no network, no colour, and a cache of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before anything imports torch or transformers; processes that tests start inherit them.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", NO_COLOR="1")
# Models this small gain nothing from a second thread, and on a busy machine threads that wait for each other take ages.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there is no GPU, Triton kernels run in its interpreter, which must be known before Triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Programs that tests start may keep their byte code: start times are promised for a program that was started before.
for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from or written to the user's cache folder."""
    os.environ["BITFLOOR_CACHE"] = str(tmp_path_factory.mktemp("cache"))

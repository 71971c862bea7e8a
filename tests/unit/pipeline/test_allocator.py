"""Large tensors give their memory back when they are freed, whatever lies behind them on the heap."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from bitfloor.pipeline.allocator import OWN_SETTINGS, steady_allocation

# A freed mapping of 30 MB makes glibc put the next tensors of that size on the heap; a small one behind each pins it.
HELD_AFTER_FREEING = """
import sys, torch
from bitfloor.pipeline.allocator import steady_allocation
from bitfloor.pipeline.memory import resident_memory

if sys.argv[1] == "steady":
    assert steady_allocation()
torch.ones(30 << 18)
before = resident_memory()
large, small = [], []
for _ in range(4):
    large.append(torch.ones(20 << 18))
    small.append(torch.ones(1 << 14))
del large
print((resident_memory() - before) >> 20)
"""


def held(mode: str) -> int:
    """MiB that stay resident after 80 MiB were freed."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", HELD_AFTER_FREEING, mode], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_is_freed_is_returned() -> None:
    assert held("steady") < 10
    assert held("default") >= 20, "glibc has changed: is the setting still needed?"


@pytest.mark.parametrize(
    "environment", [{"MALLOC_MMAP_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}]
)
def test_the_users_own_setting_stands(environment: dict[str, str]) -> None:
    assert not steady_allocation(environment)

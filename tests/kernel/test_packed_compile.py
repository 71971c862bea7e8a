"""The packed kernels compile to machine code for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
# Bytes of a thread's registers that may go through memory. Another version of Triton may need a few; more is slow.
SPILLED = 64


def compiled(architecture: int, amount: str, cache: Path) -> list[dict[str, Any]]:
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests" / "kernel" / "packed_compile.py"), str(architecture), amount]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(rows: list[dict[str, Any]]) -> None:
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"gemv_kernel", "gemm_kernel", "rows_kernel", "input_kernel"}
    for row in rows:
        assert row["bytes"] > 0
        if row["kernel"] == "gemv_kernel":
            assert "dp4a" in row["instructions"], row
        if row["kernel"] == "gemm_kernel" and row["half"]:
            # Tensor cores, whichever way they are asked on that GPU.
            assert {"mma.sync", "wgmma"} & set(row["instructions"]), row
        # Groups that end anywhere take many more registers; that way only has to be right.
        if row["resources"] is not None and row["half"] and row["asked"].get("ALIGNED", True):
            assert row["resources"][1] <= SPILLED, row


def test_for_the_h100(tmp_path: Path) -> None:
    check(compiled(90, "few", tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_variant(architecture: int, tmp_path: Path) -> None:
    rows = compiled(architecture, "all", tmp_path)
    check(rows)
    assert {row["kernel"] for row in rows} >= {"rotate_kernel"}
    shared: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["kernel"] == "gemv_kernel":
            shared[str({**row["asked"], "M": None})].add(str(row["layouts"]))
    # A row of x is summed in one order, whether another is beside it or not.
    assert all(len(layouts) == 1 for layouts in shared.values())
    assert len(shared) < sum(row["kernel"] == "gemv_kernel" for row in rows)  # or it compared nothing

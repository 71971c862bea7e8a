"""The packed kernels of the CPU from main memory: bytes a second, beside a plain read and torch's bfloat16 product.

    python bench/kernels.py [--seconds 8] [--threads 1 2] [--shape 4096 11008]

What `bitfloor bench kernels` measures (`runtime/kernel_speed.py` says how), recorded, and compared with what was
aimed at. Every case takes the given time; the best and the median of the best calls of five rounds are kept. Shares are
of the read loop of the same case.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

PARTS = ("ops/packed_native.py", "ops/packed_reference.py", "ops/form.py", "runtime/kernel_speed.py")
SOURCES = "../../csrc/packed"  # seen from the results; when a file there changes, they are stale
INT8_SHARE = 0.7  # of the read loop
FLOAT_GAIN = 0.6  # of 16 / bits, over the bfloat16 product


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="for every case and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008], metavar=("O", "I"))
    parser.add_argument("--out", type=Path, default=record.RESULTS / "kernels.json")
    return parser.parse_args(argv)


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """A measured case and whether it meets the targets."""
    wanted = FLOAT_GAIN * 16 / found["bits"]
    say(
        f"{found['case']:18}{found['threads']:2} threads  read {found['read_gb_s']:5.1f} GB/s  "
        f"int8 {found['int8']['share_of_read']:.0%} of it  float {found['float']['share_of_read']:.0%}, "
        f"{found['float']['times_bfloat16']:.1f} times bfloat16 (of {16 / found['bits']:.1f})"
    )
    return {
        **found,
        "int8_meets": found["int8"]["share_of_read"] >= INT8_SHARE,
        "float_meets": found["float"]["times_bfloat16"] >= wanted,
    }


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")


def main() -> None:
    """Measure and write."""
    args = arguments()
    import torch

    from bitfloor.core.errors import BitfloorError
    from bitfloor.ops import packed_native
    from bitfloor.runtime.kernel_speed import CASES, KernelBench

    try:
        bench = KernelBench(args.shape, args.seconds)
        runs = []
        for threads in args.threads:
            torch.set_num_threads(threads)
            runs += [judged(bench.measure(case)) for case in CASES]
    except BitfloorError as error:
        raise SystemExit(str(error)) from error
    folder = (record.RESULTS / SOURCES).resolve()
    hashes = {
        f"{SOURCES}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".cpp", ".h")
    }
    content = {
        **record.header(PARTS),
        "inputs": hashes,
        "instruction_set": packed_native.LEVELS[bench.library.level],
        "huge_pages": bench.huge_pages,
        "shape": args.shape,
        "timing": "wall time of a call, best and median of the best of five rounds; all take turns",
        "targets": {"int8_share_of_read": INT8_SHARE, "float_gain": f"{FLOAT_GAIN} * 16 / bits times bfloat16"},
        "runs": runs,
    }
    record.write_result(args.out, content)


if __name__ == "__main__":
    main()

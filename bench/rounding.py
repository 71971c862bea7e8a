"""The rounding kernel against its definition in torch: CPU seconds of each function, side by side, on one thread.

    python bench/rounding.py [--seconds 45]

Both write to memory that is there already, so that neither pays for new pages. For every shape and width the two take
turns, call by call, until the time for that case is over; the smallest and the median time of a call are kept. Before
anything is timed, both must give the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record

PARTS = ("ops/native.py", "ops/rounding_reference.py")
SOURCE = "../../csrc/rounding.cpp"  # seen from the results; when it changes, they are stale
# The matrices of a block of SmolLM2-135M (attention, keys and values, up, down), and one of a model of 7 billion.
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096))
BITS = (2, 4)
GROUP = 64
RATE = 0.005
FEWEST = 5  # calls of each, however long they take

Call = Callable[[], Any]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45, help="time for all cases together")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "rounding.json")
    return parser.parse_args(argv)


def pairs(shape: tuple[int, int], bits: int) -> dict[str, tuple[Call, Call]]:
    """By function: a call of the native one and of the reference, on the same numbers.

    Raises:
        SystemExit: the native library cannot be used.
    """
    import torch

    from bitfloor.ops import native, rounding_reference

    found = native.loaded()
    if found.library is None:
        raise SystemExit(f"there is nothing to measure: the native library is not used, {found.reason}")
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    weight, shift, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    low, high = weight.unflatten(1, (-1, GROUP)).amin(-1), weight.unflatten(1, (-1, GROUP)).amax(-1)
    scale = ((high - low) / ((1 << bits) - 1)).half().float()
    zero = torch.round(-low / scale)
    shift = 0.1 * shift
    made: list[dict[str, Call]] = []
    for code in (found.library, rounding_reference):
        out, out_codes, moved = torch.empty(shape), torch.empty(shape, dtype=torch.uint8), shift.clone()
        given = (weight, moved, scale, zero)
        made.append(
            {
                "fake_quantize": lambda f=code, g=given, o=out: (f.fake_quantize(*g, bits, GROUP, o), o)[1],
                "codes": lambda f=code, g=given, o=out_codes: (f.codes(*g, bits, GROUP, o), o)[1],
                "sign_step": lambda f=code, g=given: (*f.sign_step(*g, grad, RATE, bits, GROUP), g[1]),
            }
        )
    return {name: (made[0][name], made[1][name]) for name in made[0]}


def same(one: Any, other: Any) -> bool:
    """Whether two results have equal bits."""
    import torch

    ones, others = (given if isinstance(given, tuple) else (given,) for given in (one, other))
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def take_turns(calls: Sequence[Call], seconds: float) -> list[list[float]]:
    """CPU seconds of every call of each, one after the other, until the time is over."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + seconds
    while len(times[0]) < FEWEST or time.monotonic() < end:
        for call, taken in zip(calls, times, strict=True):
            began = time.process_time()
            call()
            taken.append(time.process_time() - began)
    return times


def measure(shape: tuple[int, int], bits: int, seconds: float) -> list[dict[str, Any]]:
    """One row per function.

    Raises:
        SystemExit: the two do not agree.
    """
    found = []
    for name, (native, reference) in pairs(shape, bits).items():
        if not same(native(), reference()):
            raise SystemExit(f"{name} of {shape} at {bits} bits: the kernel and its definition do not agree")
        ours, theirs = take_turns((native, reference), seconds / 3)
        weights = shape[0] * shape[1]
        found.append(
            {
                "function": name,
                "shape": list(shape),
                "bits": bits,
                "calls": len(ours),
                "native_us": round(1e6 * min(ours), 1),
                "native_median_us": round(1e6 * statistics.median(ours), 1),
                "reference_us": round(1e6 * min(theirs), 1),
                "reference_median_us": round(1e6 * statistics.median(theirs), 1),
                "native_ns_per_weight": round(1e9 * min(ours) / weights, 3),
                "times_faster": round(statistics.median(theirs) / statistics.median(ours), 2),
            }
        )
        last = found[-1]
        say(f"{name:14}{shape!s:>14}{bits:3} bits  {last['native_us']:>10} us  {last['times_faster']:>6} times faster")
    return found


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")


def compiler() -> str | None:
    """First line of what the C++ compiler says it is; the one that built the library, unless it was another."""
    done = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None


def main() -> None:
    """Measure and write."""
    args = arguments()
    import torch

    torch.set_num_threads(1)
    each = args.seconds / (len(SHAPES) * len(BITS))
    runs = [row for shape in SHAPES for bits in BITS for row in measure(shape, bits, each)]
    source = (record.RESULTS / SOURCE).resolve()
    content = {
        **record.header(PARTS),
        "inputs": {SOURCE: hashlib.sha256(source.read_bytes()).hexdigest()},
        "compiler": compiler(),
        "group_size": GROUP,
        "timing": "CPU time of a call, smallest and median; the two take turns; times_faster is of the medians",
        "runs": runs,
    }
    record.write_result(args.out, content)


if __name__ == "__main__":
    main()

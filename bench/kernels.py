"""The packed kernels of the CPU from main memory: bytes a second, beside a plain read and torch's bfloat16 product.

    python bench/kernels.py [--seconds 8] [--threads 1 2] [--shape 4096 11008]

For every case, distinct random matrices of 256 MB in all are multiplied with one row of x, one after the other, so that
every call reads from main memory. int8, float, a plain read loop over other memory and torch's bfloat16 product take
turns, call by call, until the time for the case is over; a round is a fifth of that time. The best call of each round
is kept, and the best and the median of the five. Shares are of the read loop of the same case. All memory is asked to
be on huge pages, that of the read loop and of the bfloat16 matrices too.

Before anything is timed, both paths must agree with the definition on the first rows.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record

PARTS = ("ops/packed_native.py", "ops/packed_reference.py", "ops/form.py")
SOURCES = "../../csrc/packed"  # seen from the results; when a file there changes, they are stale
FOOTPRINT = 256 << 20
READ = 16 << 20  # bytes of a call of the read loop
ROUNDS = 5
SLOW = 4  # the bfloat16 product takes its turn every so many times
PACKED, OFFSET = 0, 1
ROW = 0  # group size: the whole row

# name: segments as (share of the columns, bits, zero form), group size
CASES: dict[str, tuple[tuple[tuple[float, int, int], ...], int]] = {
    "1 bit, g128": (((1.0, 1, OFFSET),), 128),
    "2 bits, g64": (((1.0, 2, PACKED),), 64),
    "3 bits, g128": (((1.0, 3, PACKED),), 128),
    "4 bits, g128": (((1.0, 4, PACKED),), 128),
    "1/2/3 bits, g128": (((1 / 3, 1, OFFSET), (1 / 3, 2, PACKED), (1 / 3, 3, PACKED)), 128),
    "1+4 bits, by row": (((0.8, 1, OFFSET), (0.2, 4, PACKED)), ROW),
    "8 bits, g128": (((1.0, 8, PACKED),), 128),
}
INT8_SHARE = 0.7  # of the read loop
FLOAT_GAIN = 0.6  # of 16 / bits, over the bfloat16 product

Call = Callable[[], Any]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="for every case and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008], metavar=("O", "I"))
    parser.add_argument("--out", type=Path, default=record.RESULTS / "kernels.json")
    return parser.parse_args(argv)


def form_of(case: str, shape: Sequence[int]) -> Any:
    """The form of a case's matrix; borders between segments are multiples of 32."""
    from bitfloor.ops.form import read_form

    segments, group_size = CASES[case]
    form, left = [*shape, 0, 0, 0, 0, 0], shape[1]
    for share, bits, zero in segments:
        columns = min(left, round(shape[1] * share / 32) * 32) if (share, bits, zero) != segments[-1] else left
        form += [columns, bits, group_size or columns, zero, 0, 0]
        left -= columns
    return read_form(tuple(form))


def matrices(library: Any, form: Any) -> list[list[Any]]:
    """Random parts of as many matrices as fill the footprint."""
    import torch

    made: list[list[Any]] = []
    total = 0
    while total < FOOTPRINT:
        parts = []
        for dtype, shape in form.parts.values():
            part = torch.empty(shape, dtype=dtype)
            library.ask_for_huge_pages(part)
            part.random_(0, 256) if dtype == torch.uint8 else part.copy_(torch.rand(shape) * 0.02)
            parts.append(part)
            total += part.numel() * part.element_size()
        made.append(parts)
    return made


def check(library: Any, x: Any, parts: list[Any], form: Any) -> None:
    """Both paths against the definition.

    Raises:
        SystemExit: they do not agree.
    """
    from dataclasses import replace

    from bitfloor.ops import packed_reference

    rows = 64
    few = replace(form, numbers=(rows, *form.numbers[1:]))
    cut = [part[: rows // 16] for part in parts]
    for mode in ("float", "int8"):
        wanted = packed_reference.product(x, cut, None, few, mode)
        found = library.product(x, parts, None, form, mode == "int8")[:, :rows]
        if float((found - wanted).abs().max() / wanted.abs().max()) > 1e-5:
            raise SystemExit(f"the {mode} product and its definition do not agree on {form}")


def take_turns(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of the best call of every round."""
    best: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        taken: dict[str, list[float]] = {name: [] for name in calls}
        end, turn = time.monotonic() + seconds / ROUNDS, 0
        while turn < SLOW or time.monotonic() < end:
            for name, call in calls.items():
                if name == "bfloat16" and turn % SLOW:
                    continue
                began = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - began)
            turn += 1
        for name, times in taken.items():
            best[name].append(min(times))
    return best


def measure(case: str, shape: Sequence[int], threads: int, seconds: float, others: dict[str, Call]) -> dict[str, Any]:
    """One row of the result."""
    import torch

    from bitfloor.ops import packed_native

    library = packed_native.load().library
    assert library is not None
    form = form_of(case, shape)
    given = matrices(library, form)
    x = torch.randn(1, form.padded, generator=torch.Generator().manual_seed(0))
    check(library, x, given[0], form)
    at = {"int8": 0, "float": len(given) // 2}

    def product(mode: str) -> None:
        at[mode] += 1
        library.product(x, given[at[mode] % len(given)], None, form, mode == "int8")

    calls = {"int8": lambda: product("int8"), "float": lambda: product("float"), **others}
    times = take_turns(calls, seconds)
    size = sum(part.numel() * part.element_size() for part in given[0])
    weights = shape[0] * shape[1]
    read = READ / min(times["read"]) / 1e9
    bits = sum(s.columns * s.bits for s in form.segments) / shape[1]
    gain = min(times["bfloat16"]) / min(times["float"])
    found = {
        "case": case,
        "threads": threads,
        "bytes": size,
        "matrices": len(given),
        "bits": round(bits, 3),
        "read_gb_s": round(read, 1),
        "bfloat16_us": round(1e6 * min(times["bfloat16"]), 1),
    }
    for mode in ("int8", "float"):
        best = min(times[mode])
        found[mode] = {
            "us": round(1e6 * best, 1),
            "median_round_us": round(1e6 * statistics.median(times[mode]), 1),
            "gb_s": round(size / best / 1e9, 1),
            "share_of_read": round(size / best / 1e9 / read, 3),
            "gweights_s": round(weights / best / 1e9, 1),
            "times_bfloat16": round(min(times["bfloat16"]) / best, 2),
        }
    found["int8_meets"] = found["int8"]["share_of_read"] >= INT8_SHARE
    found["float_meets"] = gain >= FLOAT_GAIN * 16 / bits
    say(
        f"{case:18}{threads:2} threads  read {read:5.1f} GB/s  int8 {found['int8']['share_of_read']:.0%} of it  "
        f"float {found['float']['share_of_read']:.0%}, {gain:.1f} times bfloat16 (of {16 / bits:.1f})"
    )
    return found


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")


def main() -> None:
    """Measure and write."""
    args = arguments()
    import torch

    from bitfloor.ops import packed_native

    loaded = packed_native.load()
    library = loaded.library
    if library is None:
        raise SystemExit(f"there is nothing to measure: the packed kernels are not used, {loaded.reason}")
    plain, dense = torch.empty(FOOTPRINT, dtype=torch.uint8), torch.empty(2, *args.shape, dtype=torch.bfloat16)
    huge = [library.ask_for_huge_pages(part) for part in (plain, dense)]
    pieces, row = plain.fill_(1).split(READ), torch.randn(1, args.shape[1]).bfloat16()
    dense.normal_()
    turn = [0, 0]

    def read() -> None:
        turn[0] += 1
        library.read(pieces[turn[0] % len(pieces)])

    def bfloat16() -> None:
        turn[1] += 1
        torch.nn.functional.linear(row, dense[turn[1] % 2])

    runs = []
    with torch.inference_mode():
        for threads in args.threads:
            torch.set_num_threads(threads)
            others: dict[str, Call] = {"read": read, "bfloat16": bfloat16}
            runs += [measure(case, args.shape, threads, args.seconds, others) for case in CASES]
    folder = (record.RESULTS / SOURCES).resolve()
    hashes = {
        f"{SOURCES}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".cpp", ".h")
    }
    content = {
        **record.header(PARTS),
        "inputs": hashes,
        "instruction_set": packed_native.LEVELS[library.level],
        "huge_pages": all(huge),
        "shape": args.shape,
        "timing": "wall time of a call, best and median of the best of five rounds; all take turns",
        "targets": {"int8_share_of_read": INT8_SHARE, "float_gain": f"{FLOAT_GAIN} * 16 / bits times bfloat16"},
        "runs": runs,
    }
    record.write_result(args.out, content)


if __name__ == "__main__":
    main()

"""How fast the packed kernels of this machine read: bytes a second, beside a plain read and torch's bfloat16 product.

For every case, distinct random matrices of 256 MB in all are multiplied with one row of x, one after the other, so that
every call reads from main memory. int8, float, a plain read loop over other memory and torch's bfloat16 product take
turns, call by call, until the time for the case is over. The best call of each round is kept. All memory is asked to be
on huge pages, that of the read loop and of the bfloat16 matrices too.

Before anything is timed, both paths must agree with the definition on the first rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.ops import packed_native, packed_reference
from bitfloor.ops.form import OFFSET, PACKED, Form, read_form
from bitfloor.ops.packed_native import PackedLibrary

FOOTPRINT = 256 << 20  # bytes: more than caches hold
READ = 16 << 20  # bytes of a call of the read loop
ROUNDS = 5
SLOW = 4  # the bfloat16 product takes its turn every so many times
ROW = 0  # group size: the whole row
SHAPE = (4096, 11008)
AGREE = 1e-5  # of the largest output: both paths only sum in another order than the definition (decision 18)

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

Call = Callable[[], Any]
Say = Callable[[str], None]


def kernels() -> PackedLibrary:
    """The packed kernels of the CPU.

    Raises:
        InputError: there are none, with the reason.
    """
    loaded = packed_native.load()
    if loaded.library is None:
        raise InputError(f"there are no packed kernels to measure: {loaded.reason}.")
    return loaded.library


class ReadLoop:
    """A plain read of memory that no cache holds, by as many threads as torch has: how fast anything can be.

    Args:
        library: whose loop it is.
    """

    def __init__(self, library: PackedLibrary) -> None:
        whole = torch.empty(FOOTPRINT, dtype=torch.uint8)
        self.huge = bool(library.ask_for_huge_pages(whole))
        self._library, self._pieces, self._turn = library, whole.fill_(1).split(READ), 0

    def __call__(self) -> None:
        """Read the next 16 MB."""
        self._turn += 1
        self._library.read(self._pieces[self._turn % len(self._pieces)])

    def best(self, calls: int = 32) -> float:
        """GB/s of the best of some calls."""
        best = float("inf")
        for _ in range(calls):
            began = time.perf_counter()
            self()
            best = min(best, time.perf_counter() - began)
        return READ / best / 1e9


def form_of(case: str, shape: Sequence[int]) -> Form:
    """The form of a case's matrix; borders between segments are multiples of 32."""
    segments, group_size = CASES[case]
    form, left = [*shape, 0, 0, 0, 0, 0], shape[1]
    for share, bits, zero in segments:
        columns = min(left, round(shape[1] * share / 32) * 32) if (share, bits, zero) != segments[-1] else left
        form += [columns, bits, group_size or columns, zero, 0, 0]
        left -= columns
    return read_form(tuple(form))


def matrices(library: PackedLibrary, form: Form) -> list[list[Tensor]]:
    """Random parts of as many matrices as fill the footprint."""
    made: list[list[Tensor]] = []
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


def check(library: PackedLibrary, x: Tensor, parts: list[Tensor], form: Form) -> None:
    """Both paths against the definition.

    Raises:
        BitfloorError: they do not agree.
    """
    rows = min(64, form.shape[0])
    few = replace(form, numbers=(rows, *form.numbers[1:]))
    cut = [part[: -(-rows // 16)] for part in parts]
    for mode in ("float", "int8"):
        wanted = packed_reference.product(x, cut, None, few, mode)
        found = library.product(x, parts, None, form, mode == "int8")[:, :rows]
        if not float((found - wanted).abs().max() / wanted.abs().max()) <= AGREE:
            raise BitfloorError(f"the {mode} product and its definition do not agree on {form}; report this as a bug.")


def take_turns(calls: dict[str, Call], seconds: float, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of the best call of every round."""
    best: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in calls}
        end, turn = time.monotonic() + seconds / rounds, 0
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


class KernelBench:
    """Measures cases on one shape; holds what they are compared with.

    Args:
        shape: ``(O, I)`` of the matrices.
        seconds: for every case.
        rounds: in so many parts.

    Raises:
        InputError: there are no packed kernels.
    """

    def __init__(self, shape: Sequence[int] = SHAPE, seconds: float = 8, rounds: int = ROUNDS) -> None:
        self.library, self.shape, self.seconds, self.rounds = kernels(), tuple(shape), seconds, rounds
        self.read = ReadLoop(self.library)
        self._dense = torch.empty(2, *self.shape, dtype=torch.bfloat16)
        self.huge_pages = bool(self.library.ask_for_huge_pages(self._dense)) and self.read.huge
        self._dense.normal_()
        self._row, self._turn = torch.randn(1, self.shape[1]).bfloat16(), 0

    def _bfloat16(self) -> None:
        self._turn += 1
        torch.nn.functional.linear(self._row, self._dense[self._turn % 2])

    @torch.inference_mode()
    def measure(self, case: str) -> dict[str, Any]:
        """One case with as many threads as torch has, as plain data."""
        form, library = form_of(case, self.shape), self.library
        given = matrices(library, form)
        x = torch.randn(1, form.padded, generator=torch.Generator().manual_seed(0))
        check(library, x, given[0], form)
        at = {"int8": 0, "float": len(given) // 2}

        def product(mode: str) -> None:
            at[mode] += 1
            library.product(x, given[at[mode] % len(given)], None, form, mode == "int8")

        calls: dict[str, Call] = {"int8": lambda: product("int8"), "float": lambda: product("float")}
        calls |= {"read": self.read, "bfloat16": self._bfloat16}
        times = take_turns(calls, self.seconds, self.rounds)
        size = sum(part.numel() * part.element_size() for part in given[0])
        weights = self.shape[0] * self.shape[1]
        read = READ / min(times["read"]) / 1e9
        bits = sum(s.columns * s.bits for s in form.segments) / self.shape[1]
        found: dict[str, Any] = {
            "case": case,
            "threads": torch.get_num_threads(),
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
        return found


def bench_kernels(threads: Sequence[int], seconds: float, rounds: int, say: Say) -> dict[str, Any]:
    """All cases with every number of threads; the document of ``bitfloor bench kernels --json``.

    Args:
        threads: numbers of threads.
        seconds: for every case and number of threads.
        rounds: in so many parts.
        say: is told what is being measured.

    Raises:
        InputError: there are no packed kernels.
    """
    bench, before, runs = KernelBench(SHAPE, seconds, rounds), torch.get_num_threads(), []
    try:
        for count in threads:
            torch.set_num_threads(count)
            for case in CASES:
                say(f"{case}, {count} {'thread' if count == 1 else 'threads'}")
                runs.append(bench.measure(case))
    finally:
        torch.set_num_threads(before)
    return {
        "instruction_set": packed_native.LEVELS[bench.library.level],
        "huge_pages": bench.huge_pages,
        "shape": list(SHAPE),
        "rounds": rounds,
        "runs": runs,
    }

"""The packed kernels of a GPU: bytes a second, beside a copy, and times half precision in torch.

    python bench/gpu.py [--seconds 480] [--out FILE] [--quick]

First every kernel must agree with the definition, on small matrices of every width and kind and on the first matrix of
every case. Then, with one row of x, for every shape and case: distinct random matrices of more than the L2 cache are
multiplied one after the other, as a CUDA graph of one pass over them. The whole operator (``op``), the product alone
(``kernel``: x was rounded before), the operator with int8 activations (``int8``) and torch's half precision (``half``)
take turns, graph by graph; a time is that of a graph, by CUDA events, through its number of calls. The best and the
median of some rounds are kept. Shares are of a copy on the device, bytes read and written. Then come many rows
(prefill): the operator as it chooses, its two ways by force, and torch's half precision; and, while time is left, other
ways to cut the product with one row.

Whatever fails or no time is left for is in the result under ``error`` or ``skipped``, and the rest goes on. The file is
written after every part.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
from gpu_check import HALF_NEAR, captured, check, random_parts, small_cases

PARTS = (
    "ops/packed.py",
    "ops/packed_reference.py",
    "ops/form.py",
    "ops/launch.py",
    "ops/triton/activations.py",
    "ops/triton/decode.py",
    "ops/triton/dense.py",
    "ops/triton/gemv.py",
    "ops/triton/launches.py",
    "ops/triton/packed.py",
    "ops/triton/parts.py",
)
SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096))
CASES = ("4 bits, g128", "3 bits, g128", "2 bits, g64", "1/2/3 bits, g128", "1+4 bits, by row")
PREFILL = ((4096, 14336), (14336, 4096))
PREFILL_CASES = ("4 bits, g128", "2 bits, g64")
PREFILL_ROWS = (16, 64, 256, 512, 2048)
FOOTPRINT = 256 << 20  # bytes of distinct matrices: five times the L2 cache of an H100
ROUNDS = 7
REPLAYS = 3  # of a graph in a round
COPY = 1 << 30
CHECK_SECONDS = 150
SHARE, GAIN = {"4 bits, g128": 0.7, "2 bits, g64": 0.7}, {"4 bits, g128": 3.0, "2 bits, g64": 5.0}
PREFILL_SLOWER = 1.3

Call = Callable[[], Any]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="in all; what comes later is skipped")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "gpu.json")
    parser.add_argument("--quick", action="store_true", help="one shape, two cases")
    return parser.parse_args(argv)


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def attempted(found: dict[str, Any], work: Call, end: float) -> dict[str, Any]:
    """``found`` with what some work returns, or with why it did not."""
    if time.monotonic() > end:
        return {**found, "skipped": "no time was left"}
    try:
        found = {**found, **work()}
    except Exception as error:  # one kernel that fails must not lose the others' numbers
        say(f"{found}: {traceback.format_exc(limit=4)}")
        found = {**found, "error": f"{type(error).__name__}: {str(error)[:500]}"}
    gc.collect()
    return found


# -- how fast is it? --------------------------------------------------------------------------------------------------


def take_turns(graphs: dict[str, tuple[Any, int]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Microseconds of a call in every round; graphs with their numbers of calls."""
    import torch

    found: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 1):
        for name, (graph, calls) in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            stop.record()
            stop.synchronize()
            if number:  # the first round warms up
                found[name].append(1e3 * start.elapsed_time(stop) / REPLAYS / calls)
    return found


def summed(times: dict[str, list[float]]) -> dict[str, Any]:
    """Best and median of every series, microseconds."""
    return {
        name: {"us": round(min(own), 2), "median_us": round(statistics.median(own), 2)} for name, own in times.items()
    }


def copying() -> dict[str, Any]:
    """Bytes a second of a copy on the device, read and written."""
    import torch

    source, target = (torch.empty(COPY, dtype=torch.uint8, device="cuda").fill_(at) for at in range(2))
    graph, _ = captured(lambda: target.copy_(source), lambda: target.copy_(source))
    times = take_turns({"copy": (graph, 1)})["copy"]
    return {
        "gb_s": round(2 * COPY / min(times) / 1e3, 1),
        "median_gb_s": round(2e-3 * COPY / statistics.median(times), 1),
    }


def halves(shape: Sequence[int]) -> list[Any]:
    """Distinct half-precision matrices, of more than the L2 cache."""
    import torch

    count = max(2, -(-FOOTPRINT // (2 * shape[0] * shape[1])))
    return [torch.randn(*shape, dtype=torch.float16, device="cuda") for _ in range(count)]


def one_row(case: str, shape: Sequence[int], copy_gb_s: float) -> dict[str, Any]:
    """One case with one row of x."""
    import torch

    from bitfloor.ops import launch, packed
    from bitfloor.ops.backend import FLOAT, INT8
    from bitfloor.ops.triton import launches
    from bitfloor.ops.triton.parts import Matrix
    from bitfloor.runtime.kernel_speed import form_of

    form = form_of(case, shape)
    size = sum(torch.empty(0, dtype=dtype).element_size() * _count(own) for dtype, own in form.parts.values())
    given = [random_parts(form, seed) for seed in range(max(2, -(-FOOTPRINT // size)))]
    checked = check(list(form.numbers), 1, "float16")
    if not checked["right"]:
        return {"check": checked, "error": "the kernels and the definition do not agree"}
    x = torch.randn(1, shape[1], dtype=torch.float16, device="cuda")
    weights, numbers = halves(shape), list(form.numbers)
    cut = launch.few_rows(form, 1, launches.processors(x.device))
    own = [Matrix.of(form, parts) for parts in given]
    values, counters = launches.as_planes(x, own[0], launches.FLOAT_PLANES, False, cut)
    out = torch.empty(1, shape[0], dtype=torch.float16, device="cuda")

    def product() -> None:
        for matrix in own:
            launches.of_planes(values, counters, matrix, None, launches.FLOAT_PLANES, cut, out)

    works: dict[str, tuple[Call, int]] = {
        "op": (lambda: [packed.linear(x, parts, None, numbers, FLOAT) for parts in given], len(given)),
        "kernel": (product, len(given)),
        "int8": (lambda: [packed.linear(x, parts, None, numbers, INT8) for parts in given], len(given)),
        "half": (lambda: [torch.nn.functional.linear(x, weight) for weight in weights], len(weights)),
    }
    times = take_turns({name: (captured(work, work)[0], calls) for name, (work, calls) in works.items()})
    found: dict[str, Any] = {"form": numbers, "bytes": size, "matrices": len(given), **summed(times)}
    found |= {"cut": _cut(cut), "check": checked}
    for name in ("op", "kernel", "int8"):
        best = min(times[name])
        found[name]["gb_s"] = round(size / best / 1e3, 1)
        found[name]["share_of_copy"] = round(size / best / 1e3 / copy_gb_s, 3) if copy_gb_s else None
        found[name]["times_half"] = round(min(times["half"]) / best, 2)
    say(
        f"{case:18}{shape!s:16} op {found['op']['us']} us, product {found['kernel']['us']} us "
        f"({found['kernel']['share_of_copy']} of a copy), half {found['half']['us']} us"
    )
    return found


def _count(shape: Sequence[int]) -> int:
    number = 1
    for length in shape:
        number *= length
    return number


def _cut(cut: Any) -> dict[str, int]:
    return {"row_blocks": cut.blocks, "warps": cut.warps, "slices": len(cut.pieces)}


def many_rows(case: str, shape: Sequence[int], rows: int) -> dict[str, Any]:
    """One case with many rows of x: what is chosen, both ways by force, and half precision."""
    import torch

    from bitfloor.ops import packed
    from bitfloor.ops.backend import FLOAT
    from bitfloor.ops.triton import launches
    from bitfloor.ops.triton.packed import by_panels
    from bitfloor.ops.triton.parts import Matrix
    from bitfloor.runtime.kernel_speed import form_of

    form = form_of(case, shape)
    parts, weight = random_parts(form), torch.randn(*shape, dtype=torch.float16, device="cuda")
    x, own = torch.randn(rows, shape[1], dtype=torch.float16, device="cuda"), Matrix.of(form, parts)
    fused, panels = launches.some(x, own, None, x.dtype), by_panels(x, own, None)
    off = float((fused.double() - panels.double()).abs().max() / panels.double().abs().max())
    if not off <= HALF_NEAR:
        return {"error": f"both ways do not agree: {off}"}
    works: dict[str, Call] = {
        "op": lambda: packed.linear(x, parts, None, list(form.numbers), FLOAT),
        "fused": lambda: launches.some(x, own, None, x.dtype),
        "panels": lambda: by_panels(x, own, None),
        "half": lambda: torch.nn.functional.linear(x, weight),
    }
    times = take_turns({name: (captured(work, work)[0], 1) for name, work in works.items()})
    found = summed(times)
    for name in ("op", "fused", "panels"):
        found[name]["of_half"] = round(min(times[name]) / min(times["half"]), 2)
    say(f"{case:18}{shape!s:16}{rows:5} rows: {found['op']['of_half']} times half precision's time")
    return found


def other_cuts(case: str, shape: Sequence[int]) -> dict[str, Any]:
    """Microseconds of the product alone when its work is cut otherwise."""
    import torch

    from bitfloor.ops import launch
    from bitfloor.ops.triton import launches
    from bitfloor.ops.triton.parts import Matrix
    from bitfloor.runtime.kernel_speed import form_of

    form = form_of(case, shape)
    own = [Matrix.of(form, random_parts(form, seed)) for seed in range(8)]
    x = torch.randn(1, shape[1], dtype=torch.float16, device="cuda")
    out = torch.empty(1, shape[0], dtype=torch.float16, device="cuda")
    graphs: dict[str, tuple[Any, int]] = {}
    for blocks, warps, planes in ((1, 4, 3), (2, 4, 3), (4, 4, 3), (2, 2, 3), (2, 8, 3), (2, 4, 1)):
        for slices in (1, 2, 4, 7, 14):
            cut = launch.FewRows(1, blocks, warps, launch.pieces(form, slices, launch.WARP_TILES * warps))
            values, counters = launches.as_planes(x, own[0], planes, False, cut)

            def product(cut: Any = cut, values: Any = values, counters: Any = counters, planes: int = planes) -> None:
                for matrix in own:
                    launches.of_planes(values, counters, matrix, None, planes, cut, out)

            name = f"{blocks} row blocks, {warps} warps, {len(cut.pieces)} slices, {planes} planes"
            graphs[name] = (captured(product, product)[0], len(own))
    return summed(take_turns(graphs, rounds=3))


def main() -> None:
    """Measure and write."""
    args = arguments()
    import torch

    from bitfloor.ops import packed_triton

    if not torch.cuda.is_available():
        raise SystemExit("there is nothing to measure: torch finds no GPU here")
    began = time.monotonic()
    end = began + args.seconds
    loaded = packed_triton.load()
    properties = torch.cuda.get_device_properties(0)
    content: dict[str, Any] = {
        **record.header(PARTS),
        "gpu": {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "versions": {**record.versions(("torch", "triton")), "cuda": torch.version.cuda},
        },
        "timing": "CUDA events around graphs, best and median of rounds; all take turns",
        "targets": {"share_of_copy": SHARE, "times_half": GAIN, "prefill_of_half": PREFILL_SLOWER},
        "kernels": loaded.reason or "active",
    }
    record.write_result(args.out, content)
    if loaded.library is None:
        raise SystemExit(f"there is nothing to measure: the packed kernels are not used, {loaded.reason}")
    with torch.inference_mode():
        measure(content, args, end)
    content["seconds"] = round(time.monotonic() - began)
    record.write_result(args.out, content)


def measure(content: dict[str, Any], args: argparse.Namespace, end: float) -> None:
    """Every part, each written when it is done."""

    def add(key: str, row: dict[str, Any]) -> None:
        content.setdefault(key, []).append(row)
        record.write_result(args.out, content)

    until = min(end, time.monotonic() + CHECK_SECONDS)
    for name, form, rows, dtype in small_cases(args.quick):
        own = {"case": name, "rows": rows, "dtype": dtype}
        row = attempted(own, lambda form=form, rows=rows, dtype=dtype: check(form, rows, dtype), until)
        add("checks", row)
        say(f"check {name}: {row.get('right', row.get('error', 'skipped'))}")
    content["copy"] = attempted({}, copying, end)
    copy_gb_s = content["copy"].get("gb_s", 0.0)
    say(f"copy: {copy_gb_s} GB/s")
    for shape in SHAPES[:1] if args.quick else SHAPES:
        for case in CASES[::2] if args.quick else CASES:
            row = {"case": case, "shape": list(shape)}
            row = attempted(row, lambda case=case, shape=shape: one_row(case, shape, copy_gb_s), end)
            if "kernel" in row and case in SHARE:
                for name in ("op", "kernel"):
                    fast = (row[name]["share_of_copy"] or 0) >= SHARE[case]
                    row[f"{name}_meets"] = fast and row[name]["times_half"] >= GAIN[case]
            add("one_row", row)
    for rows in PREFILL_ROWS[3:] if args.quick else PREFILL_ROWS[::-1]:
        for shape in PREFILL[:1] if args.quick else PREFILL:
            for case in PREFILL_CASES:
                row = {"case": case, "shape": list(shape), "rows": rows}
                work = lambda case=case, shape=shape, rows=rows: many_rows(case, shape, rows)  # noqa: E731
                row = attempted(row, work, end)
                if "op" in row and rows >= 512:
                    row["meets"] = row["op"]["of_half"] <= PREFILL_SLOWER
                add("many_rows", row)
    for case in () if args.quick else PREFILL_CASES:
        own = {"case": case, "shape": list(SHAPES[0])}
        add("other_cuts", attempted(own, lambda case=case: other_cuts(case, SHAPES[0]), end - 45))


if __name__ == "__main__":
    main()

"""Tokens a second of a small model: the native step, transformers on the same folder, half precision, llama.cpp.

    python bench/decode.py --model FLOAT --packed DIR [DIR ...] --peer-python PYTHON [PYTHON ...] --gguf FILE [FILE ...]

Everything is asked in turns: every contestant is a process of its own, and round by round each reads 512 tokens and
then continues 16 by 64, one at a time, the others asleep. The tokens are fixed: what they mean plays no part. The best
of five rounds counts, their median stands beside it, and CPU seconds are of all threads of the process. ``products`` is
the time of all packed products of a token alone, each with its input side, called one by one.

A peer is any interpreter with ``llama-cpp-python``, built for the machine, or ``xllamacpp``, as it comes. Every folder
is compared with the peer's file of the nearest size. Numbers of threads that are done are kept in ``--work`` until all
are, so a run that was cut off goes on there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import record

PARTS = (
    "ops/decoder_native.py",
    "ops/packed_native.py",
    "runtime/native_parts.py",
    "runtime/native_step.py",
)
SOURCES = "../../csrc/packed"  # seen from the results; when a file there changes, they are stale
ROUNDS, READ, NEW, BEFORE, SOME = 5, 512, 64, 16, 8
TARGETS = {
    "products": 1.0,
    "decode": 0.8,
    "prefill": 0.5,
}  # of llama.cpp: products at most its time, the others its speed
OWN = ("native int8", "native float")
TORCH = ("eager float", "bfloat16", "float16")
PAUSE = 0.2  # seconds in which the threads of whoever had the turn before go to sleep; until then they spin
SLOW = 4  # eager models and half precision read and continue so many times fewer tokens


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the float model; without it torch is left out")
    parser.add_argument("--packed", type=Path, nargs="+", required=True, help="packed folders")
    parser.add_argument("--peer-python", type=Path, nargs="*", default=[], help="interpreters with llama.cpp")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="files for them")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--work", type=Path, default=Path("decode-work"), help="folder for what is done already")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "decode.json")
    parser.add_argument(
        "--contestant", nargs=2, help=argparse.SUPPRESS
    )  # kind and folder: a process of the measurement
    return parser.parse_args(argv)


def tokens(count: int) -> list[int]:
    """Fixed tokens, those of peers/llamacpp_speed.py."""
    return [37 * i % 40000 + 5 for i in range(count)]


# -- our contestants, each in a process of its own --------------------------------------------------------------------


def native(folder: str, int8: bool) -> Callable[[str, int], None]:
    """Our step. The first call of ``decode`` has read what comes before."""
    from bitfloor.ops import backend
    from bitfloor.runtime.hf import load_packed
    from bitfloor.runtime.native_step import NativeDecoder

    model = load_packed(folder, dtype="float32")
    decoder = NativeDecoder(model, READ + BEFORE + NEW)
    products = all_products(model, int8)

    def run(what: str, count: int) -> None:
        if what == "products":
            for _ in range(count):
                products()
            return
        with backend.int8() if int8 else nullcontext():
            if what == "decode":
                for token in tokens(count):
                    decoder.step(token)
            else:
                decoder.truncate(0)
                decoder.prefill(tokens(count))

    return run


def all_products(model: Any, int8: bool) -> Callable[[], None]:
    """All packed products of a token, the head among them, with everything at hand that they are called with."""
    import torch

    from bitfloor.ops import packed_native
    from bitfloor.ops.form import PARTS as NAMES
    from bitfloor.ops.form import read_form
    from bitfloor.runtime.linear import PackedMatrix, form_of

    library = packed_native.load().library
    assert library is not None
    linear, kept, calls = library.functions.bitfloor_packed_linear, [], []
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            form, parts = read_form(tuple(form_of(module.layout))), module.parts()
            x = torch.randn(1, form.shape[1], generator=torch.Generator().manual_seed(0))
            y = torch.empty(form.shape[0])
            given = [parts[name].data_ptr() if name in parts else None for name in NAMES]
            pointers = (packed_native.POINTER * len(given))(*given)
            kept.append((x, y, parts))
            calls.append((library.plan(form), pointers, x.data_ptr(), 0, None, y.data_ptr(), 1, int8, library.level))

    def run() -> None:
        threads = torch.get_num_threads()
        for call in calls:
            if linear(*call, threads):
                raise SystemExit(f"one of {len(kept)} products could not be made")

    return run


def torch_model(folder: str, kind: str) -> Callable[[str, int], None]:
    """A model of transformers with its own cache."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    from bitfloor.runtime.hf import load_packed

    logging.disable_progress_bar()
    if kind.startswith("eager"):
        model = load_packed(folder, dtype="float32")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind), local_files_only=True)
    cache: list[Any] = [None]

    def run(what: str, count: int) -> None:
        with torch.inference_mode():
            if what == "prefill":
                cache[0] = DynamicCache(config=model.config)
                model(torch.tensor([tokens(count)]), past_key_values=cache[0], logits_to_keep=1)
            else:
                for token in tokens(count):
                    model(torch.tensor([[token]]), past_key_values=cache[0])

    return run


def contestant(kind: str, folder: str) -> None:
    """Answer until there are no more questions, as peers/llamacpp_speed.py does."""
    import torch

    run = native(folder, kind == OWN[0]) if kind in OWN else torch_model(folder, kind)
    sys.stdout.write(json.dumps({}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        if asked["what"] == "decode":
            run("prefill", BEFORE)
        wall, used = time.perf_counter(), time.process_time()
        run(asked["what"], asked["tokens"])
        told = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - used}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


# -- the measurement --------------------------------------------------------------------------------------------------


class Contestant:
    """A process that is asked line by line.

    Args:
        name: of what it runs.
        source: folder or file.
        command: of the process.
    """

    def __init__(self, name: str, source: Path, command: Sequence[str | Path]) -> None:
        self.name, self.source = name, source
        self.bytes = sum(path.stat().st_size for path in weights(source))
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()
        self.slow = SLOW if name in TORCH else 1
        self.times: dict[str, list[tuple[float, float]]] = {}

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} of {self.source.name} gave no answer; see what it printed")
        return json.loads(line)

    def ask(self, what: str, count: int, threads: int) -> None:
        """Have it run once; seconds a token are kept."""
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"what": what, "tokens": count, "threads": threads}) + "\n")
        self.process.stdin.flush()
        told = self._answer()
        self.times.setdefault(what, []).append((told["wall"] / count, told["cpu"] / count))

    def row(self, threads: int) -> dict[str, Any]:
        """What came out, and forget it."""
        found: dict[str, Any] = {
            "name": self.name,
            "source": self.source.name,
            "bytes": self.bytes,
            "threads": threads,
            **self.about,
        }
        for what, times in self.times.items():
            walls, cpus = [wall for wall, _ in times], [cpu for _, cpu in times]
            found[what] = {
                "ms": round(1000 * min(walls), 3),
                "median_ms": round(1000 * statistics.median(walls), 3),
                "cpu_ms": round(1000 * min(cpus), 3),
                "tokens_s": round(1 / min(walls), 1),
            }
        self.times = {}
        return found


def weights(source: Path) -> list[Path]:
    """The files that hold a model's weights."""
    return [source] if source.is_file() else sorted(source.glob("*.safetensors"))


def started(args: argparse.Namespace) -> list[Contestant]:
    """All contestants, ready."""
    own = [sys.executable, Path(__file__).resolve(), "--packed", ".", "--contestant"]
    made = [Contestant(name, folder, [*own, name, folder]) for folder in args.packed for name in OWN]
    made.append(Contestant(TORCH[0], args.packed[0], [*own, TORCH[0], args.packed[0]]))
    if args.model:
        made += [Contestant(name, args.model, [*own, name, args.model]) for name in TORCH[1:]]
    script = Path(__file__).parent / "peers" / "llamacpp_speed.py"
    made += [Contestant("llama.cpp", file, [peer, script, file]) for peer in args.peer_python for file in args.gguf]
    return made


def measure(contestants: Sequence[Contestant], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Rows for a number of threads."""
    for number in range(rounds + 1):
        for each in contestants:
            each.ask("prefill", READ // each.slow, threads)
            each.ask("decode", NEW // each.slow, threads)
            if each.name in OWN:
                each.ask("products", SOME, threads)
            if number == 0:
                each.times = {}  # pages and caches are warm now
        record_line(f"{threads} threads, round {number} of {rounds}")
    return [each.row(threads) for each in contestants]


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours beside the nearest file of every peer at the same number of threads."""
    found = []
    for own in rows:
        peers = [row for row in rows if row["name"] == "llama.cpp" and row["threads"] == own["threads"]]
        for package in sorted({row["package"] for row in peers}) if own["name"] in OWN else []:
            same = [row for row in peers if row["package"] == package]
            near = min(same, key=lambda row: abs(row["bytes"] - own["bytes"]))
            ratios = {
                "products": own["products"]["ms"] / near["decode"]["ms"],
                "decode": near["decode"]["ms"] / own["decode"]["ms"],
                "prefill": near["prefill"]["ms"] / own["prefill"]["ms"],
            }
            cpu = {what: near[what]["cpu_ms"] / own[what]["cpu_ms"] for what in ("decode", "prefill")}
            met = {name: ratio >= TARGETS[name] for name, ratio in ratios.items()}
            met["products"] = ratios["products"] <= TARGETS["products"]
            found.append(
                {
                    **{key: own[key] for key in ("name", "source", "threads")},
                    "peer": f"{package}, {near['source']}",
                    "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
                    "by_cpu_seconds": {name: round(ratio, 3) for name, ratio in cpu.items()},
                    "meets": met,
                }
            )
    return found


def record_line(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(text + "\n")


def head(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    folder = (record.RESULTS / SOURCES).resolve()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
    hashes = {f"{SOURCES}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {
        **record.header(PARTS),
        "inputs": hashes,
        "timing": f"a token: best and median of {args.rounds} rounds, all take turns; {READ} tokens read, {NEW} made",
        "targets": TARGETS,
    }


def main() -> None:
    """Measure and write."""
    args = arguments()
    if args.contestant:
        contestant(*args.contestant)
        return
    about = head(args)
    kept = args.work / "decode.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    key = [about["code"], about["inputs"], [str(path) for path in (*args.packed, *args.gguf, *args.peer_python)]]
    if done.get("key") != json.loads(json.dumps(key)):
        done = {"key": key, "rows": []}
    waiting = [threads for threads in args.threads if threads not in {row["threads"] for row in done["rows"]}]
    contestants = started(args) if waiting else []
    for threads in waiting:
        done["rows"] += measure(contestants, threads, args.rounds)
        record.write_result(kept, done)
    for each in contestants:
        each.process.terminate()
    content = {**about, "rows": done["rows"], "compared": compared(done["rows"])}
    record.write_result(args.out, content)
    kept.unlink(missing_ok=True)
    for row in content["compared"]:
        record_line(json.dumps(row))


if __name__ == "__main__":
    main()

"""Decoding of a Llama-2-7B-shaped model of random packed weights, beside the read bandwidth and llama.cpp.

    python bench/seven.py --work DIR --peer-python PYTHON [--layers 32] [--threads 1 2]

For each storage (4 bits in groups of 128, 2 bits in groups of 64, PTQ1.61) a packed checkpoint and a GGUF file of
random blocks of llama.cpp's nearest size are written: Q4_0, Q2_K, IQ1_S, with embedding and output at Q6_K and at 6
bits. A process of each holds its model; they take turns making tokens, and the best of five rounds is kept. A token
reads all bytes of the layers and of the head: what a plain read loop would take for as many is the floor, measured in
every round too.

The interpreter of llama.cpp has the packages ``llama-cpp-python``; this one has ``gguf`` and ``numpy``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cost
import packed_models
import record
import synthetic

PARTS = ("runtime", "ops/packed.py", "ops/packed_native.py", "ops/form.py")
CASES = {"w4g128": "Q4_0", "w2g64": "Q2_K", "w1.61": "IQ1_S"}
TARGETS = {"w4g128": 1.0, "w2g64": 1.5, "w1.61": 3.0}  # times llama.cpp's tokens a second
SHARE = 0.7  # of the read loop
HIDDEN, INTERMEDIATE, HEAD_DIM, VOCABULARY = 4096, 11008, 128, 32_000
ROUNDS, TOKENS, PROMPT = 5, 8, 8
READ = 256 << 20
PAUSE = 0.5  # seconds in which the threads of whoever had the turn before go to sleep; until then they spin

# Both programs answer a line "threads mode" on standard input with the seconds that a token took.
OURS = """
import sys, time, torch
from bitfloor.ops import packed_native
from bitfloor.ops.backend import int8
from bitfloor.runtime.decode import open_decoder
from bitfloor.runtime.load import load_model
from contextlib import nullcontext
folder, prompt, tokens, footprint = sys.argv[1], *map(int, sys.argv[2:])
model = load_model(folder, dtype=torch.float32)
decoders = {}
for mode in ("float", "int8"):
    with int8() if mode == "int8" else nullcontext():
        decoders[mode] = open_decoder(model, 512)
        decoders[mode].prefill(range(1, prompt + 1))
library = packed_native.load().library
memory = torch.zeros(footprint, dtype=torch.uint8)
library.ask_for_huge_pages(memory)
memory.fill_(1)
print(type(decoders["float"]).__name__, flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        threads, mode = line.split()
        torch.set_num_threads(int(threads))
        if mode == "read":
            took = []
            for _ in range(5):
                began = time.perf_counter()
                library.read(memory)
                took.append(time.perf_counter() - began)
            print(min(took) / footprint, flush=True)
            continue
        with int8() if mode == "int8" else nullcontext():
            decoders[mode].truncate(prompt)
            began = time.perf_counter()
            for k in range(tokens):
                decoders[mode].step(10 + k)
            print((time.perf_counter() - began) / tokens, flush=True)
"""
THEIRS = """
import sys, time
from llama_cpp import Llama
path, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:4])
models = {}
print("llama.cpp", flush=True)
for line in sys.stdin:
    threads = int(line.split()[0])
    if threads not in models:
        models.clear()
        models[threads] = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        models[threads].eval(list(range(1, prompt + 1)))
        models[threads].eval([9])
    model = models[threads]
    model.n_tokens = prompt
    began = time.perf_counter()
    for k in range(tokens):
        model.eval([10 + k])
    print((time.perf_counter() - began) / tokens, flush=True)
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; 9 GB at 32 layers")
    parser.add_argument("--peer-python", required=True, help="interpreter that has llama-cpp-python")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=record.RESULTS / "seven.json", help="the result")
    return parser.parse_args(argv)


class Program:
    """A process that answers lines with numbers."""

    def __init__(self, line: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=cost.source_environment()
        )
        self.name = self._answer()

    def ask(self, question: str) -> float:
        """Seconds."""
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit("a program under measurement ended; what it said is above")
        return answer

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    shape = synthetic.Shape(args.layers, HIDDEN, INTERMEDIATE, HEAD_DIM)
    folder, file = args.work / case, args.work / f"{CASES[case]}.gguf"
    shutil.rmtree(folder, ignore_errors=True)
    packed_models.build(folder, shape, packed_models.STORAGES[case], VOCABULARY)
    maker = [sys.executable, str(Path(__file__).parent / "peers" / "random_gguf.py"), "--out", str(file)]
    subprocess.run([*maker, "--type", CASES[case], "--layers", str(args.layers)], check=True)
    sizes = packed_models.describe(folder)
    token_bytes = sizes["linears"] + sizes["head"] + sizes["other"]
    ours = Program([sys.executable, "-c", OURS, str(folder), str(PROMPT), str(TOKENS), str(READ)])
    theirs = Program([args.peer_python, "-c", THEIRS, str(file), str(PROMPT), str(TOKENS)])
    rows = []
    for threads in args.threads:
        found: dict[str, list[float]] = {"float": [], "int8": [], "read": [], "llama.cpp": []}
        for _ in range(ROUNDS):
            for mode in ("read", "float", "int8"):
                found[mode].append(ours.ask(f"{threads} {mode}"))
            found["llama.cpp"].append(theirs.ask(f"{threads}"))
        best = {name: min(values) for name, values in found.items()}
        floor = best.pop("read") * token_bytes
        row = {"threads": threads, "seconds": best, "floor": floor, "rounds": found}
        row["share"] = {mode: floor / best[mode] for mode in ("float", "int8")}
        row["gain"] = {mode: best["llama.cpp"] / best[mode] for mode in ("float", "int8")}
        sys.stderr.write(json.dumps({"case": case} | {k: v for k, v in row.items() if k != "rounds"}) + "\n")
        rows.append(row)
    ours.close()
    theirs.close()
    peer_bytes = file.stat().st_size
    shutil.rmtree(folder)
    file.unlink()
    made = {"case": case, "peer": CASES[case], "decoder": ours.name, "bytes": sizes, "token_bytes": token_bytes}
    return {**made, "peer_bytes": peer_bytes, "target": TARGETS[case], "threads": rows}


def main() -> None:
    """Measure and write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(case, args) for case in args.cases]
    content = {"layers": args.layers, "tokens": TOKENS, "prompt": PROMPT, "share_target": SHARE, "models": rows}
    record.write_result(args.out, {**record.header(PARTS), **content})


if __name__ == "__main__":
    main()

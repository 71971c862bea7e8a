"""Peak memory of running a packed checkpoint of more than a gigabyte, against the bytes that it must hold.

    python bench/resident.py --work DIR [--layers 10]

Llama checkpoints with LLaMA-7B's layers and random packed weights, at 4 bits and at 1.61, are loaded and continue a
prompt, in processes of their own. From the peak (``ru_maxrss``, which counts pages of mapped files too) that of a
process is taken which imports the same and loads a model of one small layer; what is left is compared with the packed
bytes and the key-value cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import packed_models
import record
import synthetic

PARTS = ("runtime", "formats/native.py", "core", "ops/packed.py", "ops/packed_native.py")
PROMPT, NEW = 256, 16
VOCABULARY = 32_000
SMALL = synthetic.Shape(layers=1, hidden=128, intermediate=256, head_dim=64)
TARGET = 1.15
CHILD = """
import json, resource, sys
from bitfloor import api
from bitfloor.runtime.load import load_model, load_tokenizer
from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.text_model import generate_text
model = load_model(sys.argv[1], dtype=sys.argv[4])
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = Settings(max_new_tokens=int(sys.argv[3]))
out = generate_text(model, load_tokenizer(sys.argv[1]), "a" * int(sys.argv[2]), settings)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"loaded": 1024 * loaded, "peak": 1024 * peak, "tokens": out.prompt_tokens + out.new_tokens}))
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; 2 GB")
    parser.add_argument("--layers", type=int, default=10, help="of the model at 4 bits; 2.5 times as many at 1.61")
    parser.add_argument("--dtype", default="bfloat16", help="of activations and cache")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "resident.json", help="the result")
    return parser.parse_args(argv)


def run(folder: Path, dtype: str) -> dict[str, Any]:
    """Load and generate in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(folder), str(PROMPT), str(NEW), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(work: Path, name: str, layers: int, dtype: str) -> dict[str, Any]:
    """A row of the result."""
    shape = synthetic.Shape(layers, hidden=4096, intermediate=11008, head_dim=128)
    storage = packed_models.STORAGES[name]
    folder, small = work / name, work / f"{name}-small"
    for path, size in ((folder, shape), (small, SMALL)):
        shutil.rmtree(path, ignore_errors=True)
        packed_models.build(path, size, storage, VOCABULARY if path == folder else 300)
    bytes_of = packed_models.describe(folder)
    own, base = run(folder, dtype), run(small, dtype)
    cache = 2 * layers * own["tokens"] * shape.hidden * {"float32": 4}.get(dtype, 2)
    must = sum(bytes_of.values()) + cache
    row = {
        "name": name,
        "layers": layers,
        "dtype": dtype,
        "bytes": bytes_of,
        "cache": cache,
        "import_only": base["peak"],
    }
    row |= {"loaded": own["loaded"], "peak": own["peak"], "ratio": (own["peak"] - base["peak"]) / must}
    sys.stderr.write(json.dumps(row) + "\n")
    for path in (folder, small):
        shutil.rmtree(path)
    return row


def main() -> None:
    """Measure and write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    layers = {"w4g128": args.layers, "w1.61": round(2.5 * args.layers)}
    rows = [measure(args.work, name, count, args.dtype) for name, count in layers.items()]
    record.write_result(args.out, {**record.header(PARTS), "target": TARGET, "prompt": PROMPT, "models": rows})


if __name__ == "__main__":
    main()

"""What PTQ1.61 stores of a block of LLaMA-7B: bytes in a real file, beside what ``plan`` promises and a formula.

    python bench/shapes.py --work DIR

A model of one layer with LLaMA-7B's matrices (202 million weights), random, and a vocabulary of bytes is packed by the
preset ``ptq161`` without learning: bytes follow from shapes alone. The sizes are read from the headers of the files by
this program, not by the package. All three numbers must be equal, matrix by matrix; ``plan`` is asked before.

Beside the block, the formula for other shapes, with salient channels counted in multiples of 16 and of 32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import synthetic

RECIPE = "ptq161"
SEQUENCES, SEQLEN = 8, 64
BLOCK = synthetic.Shape(layers=1, hidden=4096, intermediate=11008, head_dim=128, dtype="bfloat16")
PREFIX = "model.layers.0."
# Matrices of a module that one tensor feeds share the order of their channels; the first of them stores it.
SHARING = ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576), (192, 576), (1536, 576), (576, 1536))
MULTIPLES = (16, 32)
RATIO, SALIENT_BITS = 0.2, 4
TILE_ROWS, TILE_COLUMNS = 16, 32


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and what is made of it; 0.5 GB")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "shapes.json", help="the result")
    return parser.parse_args(argv)


def salient_channels(columns: int, multiple: int) -> int:
    """A fifth, in whole multiples if there is one."""
    count = int(RATIO * columns)
    return count // multiple * multiple or count


def formula(rows: int, columns: int, multiple: int, *, order: bool = True) -> int:
    """Bytes of a matrix ``[rows, columns]`` as docs/methods/ptq161.md says it."""
    salient = salient_channels(columns, multiple)
    blocks = -(-rows // TILE_ROWS)
    tiles = SALIENT_BITS * -(-salient // TILE_COLUMNS) + -(-(columns - salient) // TILE_COLUMNS)
    codes = blocks * tiles * TILE_ROWS * TILE_COLUMNS // 8
    vectors = blocks * TILE_ROWS * 2 * 3 + blocks * TILE_ROWS * SALIENT_BITS // 8
    entry = 1 if columns <= 256 else 2 if columns <= 65536 else 4
    return codes + vectors + 2 * (columns - salient) + (entry * columns if order else 0)


def file_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the folder's safetensors files, from their headers: eight bytes of length, then JSON."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            found[name] = last - first
    return found


def matrix_sizes(tensors: Mapping[str, int]) -> dict[str, int]:
    """Summed bytes of the matrices of the block: its tensors that are no norm, by what stands before their last dot."""
    sizes: dict[str, int] = {}
    for name, size in tensors.items():
        owner = name.removeprefix(PREFIX).rpartition(".")[0]
        if name.startswith(PREFIX) and "norm" not in owner:
            sizes[owner] = sizes.get(owner, 0) + size
    return sizes


def measure(work: Path) -> list[dict[str, Any]]:
    """Pack the block; a row a matrix.

    Raises:
        SystemExit: the three numbers differ.
    """
    from bitfloor import api

    model, out = work / "llama-7b-block", work / "packed"
    for folder in (model, out):
        shutil.rmtree(folder, ignore_errors=True)
    synthetic.build(model, BLOCK)
    text = synthetic.write_text(model, SEQUENCES, 2 * SEQLEN + 64)
    overrides = overrides_of()
    planned = api.plan(model, RECIPE, overrides=overrides, calibration=str(text))
    promised = {m["name"].removeprefix(PREFIX): m for m in planned["matrices"] if m["name"].startswith(PREFIX)}
    report = api.quantize(model, out, RECIPE, overrides=overrides, calibration=str(text))
    stored = matrix_sizes(file_bytes(out))
    rows = []
    for name, matrix in promised.items():
        high, wide = matrix["shape"]
        row = {
            "name": name,
            "shape": [high, wide],
            "salient": salient_channels(wide, 32),
            "file": stored[name],
            "plan": matrix["bytes"],
            "formula": formula(high, wide, 32, order=name not in SHARING),
        }
        say(json.dumps(row))
        rows.append(row)
    total = sum(row["file"] for row in rows)
    if stored.keys() != promised.keys() or any(len({row["file"], row["plan"], row["formula"]}) > 1 for row in rows):
        raise SystemExit("the file, the plan and the formula do not agree")
    if total != report["bytes"]["linears"] or total != planned["bytes"]["linears"]:
        raise SystemExit("the report or the plan sums to something else than the file")
    for folder in (model, out):
        shutil.rmtree(folder)
    return rows


def overrides_of() -> list[str]:
    """A short text, and nothing learned."""
    return [
        "method.steps=0",
        f"calibration.sequences={SEQUENCES}",
        f"calibration.seqlen={SEQLEN}",
        "calibration.mode=documents",
        "calibration.min_chars=0",
    ]


def other_shapes() -> list[dict[str, Any]]:
    """The formula for single matrices, each with an order of its own."""
    return [
        {"shape": [rows, columns], "multiple": multiple, "salient": salient_channels(columns, multiple)}
        | {"bytes": formula(rows, columns, multiple)}
        for rows, columns in SHAPES
        for multiple in MULTIPLES
    ]


def say(text: str) -> None:
    """Progress goes to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> None:
    """Measure and write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    overrides = overrides_of()
    sha256 = record.recipe_sha256(RECIPE, overrides, synthetic.CALIBRATION)
    recipe = {"preset": RECIPE, "overrides": overrides, "calibration": synthetic.CALIBRATION, "sha256": sha256}
    head = record.header((*record.parts_of(RECIPE), "formats", "pipeline/sizes.py", "pipeline/layouts.py"))
    rows = measure(args.work)
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    total = sum(row["file"] for row in rows)
    block = {"weights": weights, "bytes": total, "bits_per_linear_weight": 8 * total / weights, "matrices": rows}
    record.write_result(args.out, {**head, "recipe": recipe, "block": block, "shapes": other_shapes()})
    say(f"{total} bytes, {8 * total / weights:.4f} bits a linear weight")


if __name__ == "__main__":
    main()

"""Peak memory of a run: does it grow with depth, does it stay below the checkpoint, is it what ``plan`` says?

    python bench/memory.py --work DIR

Builds two synthetic Llama checkpoints of one width, with 24 and 48 layers (random weights; the deeper one is over
2 GB), and quantizes both with GPTQ through the command line program, each in a process of its own whose peak resident
memory the kernel keeps. ``bitfloor plan`` is asked first, in its own process, as a user would. Three checks:

    depth        the peaks differ by less than 5%
    checkpoint   the deeper model's peak is below the size of its weights
    plan         each prediction is within 15% of the measured peak

Peak resident memory is what ``ru_maxrss`` says: everything the process touched, Python and torch and pages of mapped
files included. Calibration is 16 sequences of 128 tokens: it decides the size of the streams, which are kept in memory.
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

import cost
import record
import synthetic

DEPTH_TOLERANCE = 0.05
PLAN_TOLERANCE = 0.15
MIN_BYTES = 2_000_000_000


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; needs 6 GB")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "memory.json")
    parser.add_argument("--recipe", default="gptq-w3g64")
    parser.add_argument("--layers", type=int, nargs=2, default=(24, 48), metavar=("FEW", "MANY"))
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the largest peak counts")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints and what was made of them")
    return parser.parse_args(argv)


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The small calibration."""
    return [
        f"calibration.sequences={args.sequences}",
        f"calibration.seqlen={args.seqlen}",
        "calibration.mode=documents",
        "calibration.min_chars=0",
        # The range search works on panels of two megabytes: it takes most of the time and adds nothing to the peak.
        "method.range=minmax",
    ]


def measure_depth(layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Build one checkpoint, plan it, quantize it."""
    folder = args.work / f"llama-{layers}"
    shape = synthetic.Shape(layers, args.hidden, args.intermediate)
    say(f"{layers} layers: building")
    weights = synthetic.build(folder, shape)
    synthetic.write_text(folder, args.sequences, 2 * args.seqlen + 64)
    environment = cost.source_environment()
    common = [folder.name, "--recipe", args.recipe, "--calib", f"{folder.name}/{synthetic.CALIBRATION}"]
    said = subprocess.run(
        cost.bitfloor_command("plan", *common, "--json", *overrides_of(args)),
        cwd=args.work, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if said.returncode:
        raise SystemExit(f"bitfloor plan failed:\n{said.stderr[-2000:]}")
    planned = json.loads(said.stdout)
    runs = []
    for _ in range(args.repeats):
        say(f"{layers} layers: quantizing")
        out = args.work / f"{folder.name}-quantized"
        line = cost.bitfloor_command("quantize", *common, "--out", out.name, "--no-resume", *overrides_of(args))
        runs.append(cost.measure(line, cwd=args.work, env=environment))
    if not args.keep:
        shutil.rmtree(folder)
        shutil.rmtree(args.work / f"{folder.name}-quantized")
    return {
        "layers": layers,
        "checkpoint_bytes": weights,
        "planned_bytes": planned["peak_memory_bytes"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "runs": runs,
    }


def check(few: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    """The three checks; each has its number and whether it holds."""
    growth = many["peak_rss_bytes"] / few["peak_rss_bytes"] - 1
    share = many["peak_rss_bytes"] / many["checkpoint_bytes"]
    errors = [model["planned_bytes"] / model["peak_rss_bytes"] - 1 for model in (few, many)]
    worst = max(errors, key=abs)
    return {
        "depth": {"growth": growth, "limit": DEPTH_TOLERANCE, "holds": abs(growth) < DEPTH_TOLERANCE},
        "checkpoint": {
            "peak_over_checkpoint": share,
            "limit": 1.0,
            "large_enough": many["checkpoint_bytes"] >= MIN_BYTES,
            "holds": share < 1.0,
        },
        "plan": {"errors": errors, "limit": PLAN_TOLERANCE, "holds": abs(worst) < PLAN_TOLERANCE},
    }


def say(text: str) -> None:
    """Progress goes to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> None:
    """Measure both depths, check, write; the exit status is 1 when a check does not hold."""
    args = arguments()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    overrides = overrides_of(args)
    recipe = {
        "preset": args.recipe,
        "overrides": overrides,
        "calibration": synthetic.CALIBRATION,
        "sha256": record.recipe_sha256(args.recipe, overrides, synthetic.CALIBRATION),
    }
    head = record.header((*record.parts_of(args.recipe), *record.RUNNING))
    few, many = (measure_depth(layers, args) for layers in args.layers)
    checks = check(few, many)
    shape = {"hidden": args.hidden, "intermediate": args.intermediate, "dtype": "bfloat16"}
    record.write_result(args.out, {**head, "recipe": recipe, "shape": shape, "models": [few, many], "checks": checks})
    for model in (few, many):
        say(
            f"{model['layers']} layers: checkpoint {model['checkpoint_bytes'] / 1e9:.2f} GB, "
            f"peak {model['peak_rss_bytes'] / 1e9:.3f} GB, planned {model['planned_bytes'] / 1e9:.3f} GB"
        )
    failed = [name for name, found in checks.items() if not found["holds"]]
    for name in failed:
        say(f"does not hold: {name} {checks[name]}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

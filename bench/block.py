"""One block against auto-round: what 200 steps cost, and what it costs to reach its error on text neither has seen.

    python bench/block.py --model DIR --work DIR --peer-python V/bin/python --bits 2 --peer-weights W2.safetensors

*Cost at equal settings.* The model is cut to its first layer. This package and auto-round (``peers/``, in an
environment of its own) quantize it by SignRound, batches of 4 x 256 tokens, once with few steps and once with 200 more;
the difference in CPU seconds is what 200 steps of a block cost, compilation and loading left out. Rounds alternate
between the two. Beside them, what the products of 200 steps cost by themselves: forward, gradients of weights, and of
those inputs that need one, in bfloat16, nothing else.

*Error.* The peer's own quantized weights lead the second stream to ``--block``. There the peer's weights of this block,
and what methods of this package make of it from the same inputs, are compared by the error of the block's output on
text that calibrated neither, as in ``ablation.py``. The peer's seconds are the median of its 30 blocks as it logged
them; a block of the middle, so nothing is compiled in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ablation
import cost
import record
import unchanged

FEW, MORE = 40, 240
OWN = "bitfloor-w{bits}g64"
START = ("method.steps=0", "method.choose=false")
QUICK = ("method.choose=false", "method.correction=0", "method.sweeps=1", "method.sequential=false")
VARIANTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("signround", "signround-w{bits}g64", ()),
    ("start", OWN, START),
    ("start, no correction", OWN, (*START, "method.correction=0")),
    ("start, no correction, one sweep", OWN, (*START, "method.correction=0", "method.sweeps=1")),
    (
        "start, no correction, one sweep, one pass",
        OWN,
        (*QUICK, "method.steps=0"),
    ),
    ("the same, 15 steps", OWN, (*QUICK, "method.steps=15", "method.rate=0.005")),
    ("the same, 20 steps", OWN, (*QUICK, "method.steps=20", "method.rate=0.005")),
    ("the same, 20 larger steps", OWN, (*QUICK, "method.steps=20", "method.rate=0.01")),
    ("all steps", OWN, ()),
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the yardstick model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the cut model and what is made of it")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--peer-python", type=Path, help="interpreter with auto-round; without it no cost is measured")
    parser.add_argument("--peer", help="name of its result, default autoround_w<bits>_default")
    parser.add_argument("--peer-weights", type=Path, help="weights of that result; without them no error is measured")
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "block", help="folder for the results")
    return parser.parse_args(argv)


def own_command(model: Path, args: argparse.Namespace, steps: int) -> list[str]:
    """SignRound by this package."""
    text = record.data_file(args.data, ablation.CALIBRATION)
    settings = ("sequences=128", "seqlen=256", "mode=documents", "min_chars=1500", f"batch_size={ablation.BATCH}")
    overrides = [f"calibration.{setting}" for setting in settings] + ["embedding.bits=16", f"method.steps={steps}"]
    overrides += ["method.rate=0.005", "method.range_rate=0.005"]
    recipe = f"signround-w{args.bits}g64"
    out = args.work / "own"
    command = ["quantize", model, "--out", out, "--recipe", recipe, "--calib", text, "--no-resume", *overrides]
    return cost.bitfloor_command(*command)


def peer_command(model: Path, args: argparse.Namespace, steps: int) -> list[str]:
    """The same by auto-round."""
    script = Path(__file__).parent / "peers" / "autoround_yardstick.py"
    text = record.data_file(args.data, ablation.CALIBRATION)
    options: list[Any] = ["--bits", args.bits, "--steps", steps, "--lr", 0.005, "--weights", args.work / "peer.st"]
    options += ["--model", model, "--calibration", text, "--out", args.work / "peer.json"]
    return [str(word) for word in (args.peer_python, script, "quantize", *options)]


def steps_cost(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of 200 steps of one block, by both, and of its products alone; by round."""
    args.work.mkdir(parents=True, exist_ok=True)
    model = unchanged.cut(args.model, 1, args.work / "one-layer")
    found: dict[str, list[float]] = {"bitfloor": [], "auto-round": [], "products": []}
    for _ in range(args.rounds):
        for name, command in (("bitfloor", own_command), ("auto-round", peer_command)):
            env = cost.source_environment() if name == "bitfloor" else {**os.environ, "HF_HUB_OFFLINE": "1"}
            took = [cost.measure(command(model, args, steps), env=env)["cpu_seconds"] for steps in (FEW, MORE)]
            found[name].append(round(took[1] - took[0], 2))
        found["products"].append(round(products_cost(model, MORE - FEW), 2))
        sys.stdout.write(f"{ {name: values[-1] for name, values in found.items()} }\n")
        sys.stdout.flush()
    middle = {name: statistics.median(values) for name, values in found.items()}
    shares = {name: round(middle[name] / middle["auto-round"], 3) for name in ("bitfloor", "products")}
    return {"steps": MORE - FEW, "cpu_seconds": found, "of_auto_round": shares}


def products_cost(model: Path, steps: int) -> float:
    """CPU seconds of a block's products in so many steps: no attention, no norm, no rounding."""
    import torch

    from bitfloor.modeling.loader import open_source

    source = open_source(model)
    names = ("q_proj", "k_proj", "v_proj")  # fed by what has no gradient: the block's own input
    tokens = ablation.BATCH * ablation.SEQLEN
    generator = torch.Generator().manual_seed(0)
    work = []
    for ref in source.map.block_matrices(0):
        rows, columns = ref.shape
        shapes = ((rows, columns), (tokens, columns), (tokens, rows))
        parts = [torch.randn(*shape, generator=generator).bfloat16() for shape in shapes]
        work.append((*parts, not ref.name.endswith(names)))

    def once() -> None:
        for weight, x, grad, inner in work:
            torch.matmul(x, weight.T)
            torch.matmul(grad.T, x)
            if inner:
                torch.matmul(grad, weight)

    for _ in range(3):
        once()
    began = time.process_time()
    for _ in range(steps):
        once()
    return time.process_time() - began


def errors(args: argparse.Namespace, peer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The peer's block and variants of ours, from the inputs that the peer's own blocks before it give."""
    from safetensors import safe_open

    with safe_open(args.peer_weights, framework="pt") as file:

        def dense(refs: Any) -> dict[str, Any]:
            return {ref.name: file.get_tensor(f"{ref.name}.weight") for ref in refs}

        setting = ablation.prepare(args, lambda source: lambda runner, refs, inputs: dense(refs))
        own = dense(setting.source.map.block_matrices(args.block))
    times = [entry["cpu_seconds_so_far"] for entry in peer["blocks"]]
    seconds = statistics.median(after - before for before, after in zip(times, times[1:], strict=False))
    rows = [{"name": "auto-round", "cpu_seconds": round(seconds, 2), **ablation.judge(setting, own)}]
    show(rows[-1])
    for name, preset, overrides in VARIANTS:
        weights, took, told = ablation.quantize(setting, preset.format(bits=args.bits), overrides)
        row = {"name": name, "preset": preset.format(bits=args.bits), "overrides": list(overrides)}
        rows.append({**row, "cpu_seconds": round(took, 2), **ablation.judge(setting, weights), **told})
        show(rows[-1])
    return rows


def show(row: Mapping[str, Any]) -> None:
    """One line of what was found."""
    numbers = " ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float) and k != "cpu_seconds")
    sys.stdout.write(f"{row['name']:44s} {row['cpu_seconds']:6.1f} s  {numbers}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure what the given options allow, and keep what was measured before of the rest."""
    args = arguments()
    name = args.peer or f"autoround_w{args.bits}_default"
    peer = record.read_result(record.RESULTS / "peers" / f"{name}.json")
    path = args.out / f"block{args.block}-w{args.bits}.json"
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    content = {key: content[key] for key in ("cost", "errors") if key in content}
    if args.peer_python is not None:
        content["cost"] = steps_cost(args)
    if args.peer_weights is not None:
        content["errors"] = errors(args, peer)
    head = record.header(tuple(sorted({part for m in ("bitfloor", "signround") for part in record.quality(m)})))
    about = {"model": args.model.resolve().name, "block": args.block, "bits": args.bits, "peer": name}
    record.write_result(path, {**head, **about, **content})


if __name__ == "__main__":
    main()

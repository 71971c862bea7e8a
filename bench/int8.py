"""What rounding activations to int8 costs a packed model: perplexity on both texts with and without, paired.

    python bench/int8.py --model DIR --work DIR [--data DIR] rtn-w4g64 rtn-w4g64,spec.group_size=128 bitfloor-fast-w2g64

The model is quantized with each preset as shipped, or with what is said behind it, embedding and head packed at 8 bits.
It is scored twice by the same windows of the yardstick: with float activations, and with int8 in every packed product,
head included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import yardstick

PARTS = ("ops/packed.py", "ops/packed_native.py", "ops/packed_reference.py", "ops/form.py", "runtime/linear.py")
TARGET = 0.005  # rise of perplexity


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", metavar="PRESET[,KEY=VALUE...]", help="presets, and overrides")
    parser.add_argument("--model", type=Path, required=True, help="folder of the yardstick model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the quantized models, which stay")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "int8.json", help="the result")
    return parser.parse_args(argv)


def packed(preset: str, args: argparse.Namespace) -> Path:
    """The quantized model, made unless it is there."""
    out = args.work / preset.replace("=", "-").replace(",", "+")
    if not (out / "config.json").is_file():
        yardstick.quantize(preset.partition(",")[0], out, scoring(args, preset))
    return out


def scoring(args: argparse.Namespace, preset: str) -> argparse.Namespace:
    """The yardstick's settings, the embedding stored as shipped."""
    name, *overrides = preset.split(",")
    line = [
        name,
        *(part for override in overrides for part in ("--set", override)),
        "--model",
        str(args.model),
        "--work",
        str(args.work),
        "--embedding-bits",
        "8",
    ]
    line += ["--windows", str(args.windows), *(["--data", str(args.data)] if args.data else [])]
    return yardstick.arguments(line)


def measure(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """A row: both perplexities of both texts, and the paired difference."""
    from bitfloor.data.sources import load_text
    from bitfloor.data.tokenize import evaluation_windows
    from bitfloor.evaluation.paired import paired_difference
    from bitfloor.evaluation.perplexity import perplexity
    from bitfloor.ops.backend import int8
    from bitfloor.runtime.load import load_model, load_tokenizer

    out = packed(preset, args)
    model, tokenizer = load_model(out), load_tokenizer(out)
    texts = {}
    for name, file, layout in yardstick.TEXTS:
        source = load_text(f"{record.data_file(args.data, file)}:{layout}", "evaluation")
        windows = evaluation_windows(tokenizer, source, windows=args.windows, seqlen=2048)
        exact = perplexity(model, windows)
        with int8():
            rounded = perplexity(model, windows)
        nats = paired_difference(rounded, exact)
        texts[name] = {
            "float": exact.value,
            "int8": rounded.value,
            "rise": rounded.value / exact.value - 1.0,
            "nats": {"delta": nats.delta_nll, "ci95": nats.ci95},
        }
        yardstick.say(f"{preset} {name}: {texts[name]}")
    return {"preset": preset, "texts": texts}


def main() -> None:
    """Measure and write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [measure(preset, args) for preset in args.presets]
    content = {"model": args.model.resolve().name, "windows": args.windows, "target": TARGET, "rows": rows}
    record.write_result(args.out, {**record.header(PARTS), **content})


if __name__ == "__main__":
    main()

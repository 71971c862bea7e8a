"""What a tied embedding and head lose at each width, rounded to nearest and towards the logits; all else stays float.

    python bench/embedding.py --model DIR --work DIR [--data DIR]

Calibration text, scoring texts and settings are the yardstick's. After every row the result is written, so a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import record
import yardstick

RECIPE = "rtn-minmax-w4g64"
ROWS = ((8, "nearest"), (4, "nearest"), (4, "gptq"), (3, "nearest"), (3, "gptq"))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the yardstick model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the quantized models")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "embedding.json", help="the result")
    return parser.parse_args(argv)


def main() -> None:
    """Every width, rounded in both ways."""
    from bitfloor import api

    args = arguments()
    common = ["--model", str(args.model), "--work", str(args.work), *(["--data", str(args.data)] if args.data else [])]
    scoring = yardstick.arguments(common)
    text = str(record.data_file(args.data, yardstick.CALIBRATION))
    head = record.header(record.parts_of(RECIPE, ["head.rounding=gptq", "embedding.bits=4"]))
    old = record.read_result(args.out) if args.out.is_file() and record.stale(args.out) is None else {"rows": []}
    rows = list(old["rows"])
    for bits, rounding in ROWS:
        if any((row["bits"], row["rounding"]) == (bits, rounding) for row in rows):
            continue
        recipe = {
            "method": {"name": "rtn", "range": "minmax"},
            "spec": {"bits": 4, "group_size": 64},
            "layers": [{"match": "*", "keep": True}],
            "embedding": {"bits": bits, "group_size": 64},
            "head": {"rounding": rounding},
            "calibration": {"text": "default", "seqlen": 256, "mode": "documents"},
        }
        out = args.work / "embedding"
        shutil.rmtree(out, ignore_errors=True)
        calibration = text if rounding == "gptq" else None
        report = api.quantize(args.model, out, recipe, calibration=calibration)
        found = yardstick.score(out, scoring)["perplexity"]
        texts = {name: {"ppl": own["ppl"], "nll_per_window": own["nll_per_window"]} for name, own in found.items()}
        rows.append({"bits": bits, "rounding": rounding, "bytes": report["bytes"]["embeddings"], "texts": texts})
        yardstick.say(f"{bits} {rounding}: {[own['ppl'] for own in texts.values()]}")
        shutil.rmtree(out)
        record.write_result(args.out, {**head, "model": args.model.resolve().name, "group_size": 64, "rows": rows})


if __name__ == "__main__":
    main()

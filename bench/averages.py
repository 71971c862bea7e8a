"""What a budget promises and what is stored: the yardstick model at several mean widths.

    python bench/averages.py --model DIR --work DIR [--data DIR]

``bitfloor plan`` says how many bits a linear weight will take at most, before anything is read; then the model is
surveyed, allocated and stored. How it is rounded makes no difference to that, so it is rounded to nearest.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import record
import yardstick

AVERAGES = (2.0, 2.25, 2.5, 3.0)
RECIPE = "rtn-minmax-w2g64"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the yardstick model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the quantized models")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "averages.json", help="the result")
    return parser.parse_args(argv)


def main() -> None:
    """Every average, with channels in their own order and sorted."""
    from bitfloor import api

    args = arguments()
    text = str(record.data_file(args.data, yardstick.CALIBRATION))
    head = record.header(record.parts_of(RECIPE, ["allocation.policy=budget"]))
    old = record.read_result(args.out) if args.out.is_file() and record.stale(args.out) is None else {"rows": []}
    rows = list(old["rows"])
    for sort in (False, True):
        for average in AVERAGES:
            if any((row["average"], row["sort"]) == (average, sort) for row in rows):
                continue
            recipe = [
                "allocation.policy=budget",
                f"allocation.average={average}",
                f"allocation.sort={str(sort).lower()}",
                "allocation.sequences=2",
                "calibration.seqlen=256",
                "calibration.mode=documents",
            ]
            out = args.work / "averages"
            shutil.rmtree(out, ignore_errors=True)
            planned = api.plan(args.model, RECIPE, overrides=recipe, calibration=text)
            report = api.quantize(args.model, out, RECIPE, overrides=recipe, calibration=text)
            plan = json.loads((out / "plan.json").read_text("utf-8"))
            row = {
                "average": average,
                "sort": sort,
                "promised": planned["bits_per_linear_weight"],
                "stored": report["bits_per_linear_weight"],
                "gap": plan["summary"]["gap"],
            }
            yardstick.say(json.dumps(row))
            rows.append(row)
            shutil.rmtree(out)
            # After every row: a run that was stopped goes on where it was.
            record.write_result(args.out, {**head, "model": args.model.resolve().name, "rows": rows})


if __name__ == "__main__":
    main()

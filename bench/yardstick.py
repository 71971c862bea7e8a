"""Quantize the yardstick model with presets of bitfloor and score what comes out, by the project's one yardstick.

    python bench/yardstick.py --model DIR --work DIR --float gptq-w2g64 gptq-w3g64 rtn-w3g64
    python bench/yardstick.py --model DIR --work DIR --embedding-bits 8 gptq-w2g64 --set method.damping=0.05

Calibration: the first 128 documents over 1,500 characters of ``calib/c4_calibration.txt``, their first 256 tokens each.
Perplexity: ``wikitext2/wiki.test.raw`` as it stands and ``calib/c4_unseen.txt`` (one document a line, a blank line
between two), 20 windows of 2,048 tokens. The embedding stays at 16 bits unless asked otherwise, because that is what
the peers do. docs/measuring.md says why.

Each preset gives ``bench/results/yardstick/NAME.json``; one whose code, recipe and settings are unchanged is skipped.
Quantization runs as the command line program in a process of its own, so that its CPU seconds and its peak memory are
those a user would see (Python's start included).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cost
import record

CALIBRATION = "calib/c4_calibration.txt"
# Name in the results, file, layout of it (docs/evaluation.md).
TEXTS = (("wiki", "wikitext2/wiki.test.raw", "whole"), ("c4", "calib/c4_unseen.txt", "lines"))
FLOAT = "float"
SEQUENCES = 128


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="names of presets (bitfloor recipes ls)")
    parser.add_argument("--model", type=Path, required=True, help="folder of the yardstick model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the quantized models")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "yardstick", help="folder for the results")
    parser.add_argument("--float", action="store_true", help="also score the model as it is")
    parser.add_argument("--embedding-bits", type=int, choices=(16, 8, 6, 5, 4), default=16)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe; repeatable")
    parser.add_argument("--force", action="store_true", help="measure again what is fresh")
    parser.add_argument(
        "--resume", action="store_true", help="go on where a quantization was cut off; its cost is added up"
    )
    parser.add_argument("--keep", action="store_true", help="leave the quantized models in the work folder")
    parser.add_argument(
        "--calibration", metavar="SPEC", help="calibrate on another text; the yardstick's is the default"
    )
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="calibration sequences")
    parser.add_argument("--calibration-seqlen", type=int, default=256)
    return parser.parse_args(argv)


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The yardstick as changes to a recipe; the text is given beside them."""
    return [
        f"calibration.sequences={args.sequences}",
        f"calibration.seqlen={args.calibration_seqlen}",
        f"calibration.mode={'documents' if args.calibration is None else 'auto'}",
        "calibration.min_chars=1500",
        f"embedding.bits={args.embedding_bits}",
        *args.set,
    ]


def result_name(preset: str, args: argparse.Namespace) -> str:
    """File name of a result: the preset, and what was changed in it."""
    changes = [f"embedding{args.embedding_bits}"] if args.embedding_bits != 16 else []
    changes += [f"sequences-{args.sequences}"] if args.sequences != SEQUENCES else []
    changes += [f"calibrated-on-{Path(args.calibration).name}"] if args.calibration else []
    changes += [change.replace("=", "-").replace("/", "-") for change in args.set]
    return "+".join([preset, *changes])


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, besides the code and the recipe."""
    texts = [{"name": name, "file": Path(file).name, "layout": layout} for name, file, layout in TEXTS]
    return {"model": args.model.resolve().name, "texts": texts, "windows": args.windows, "seqlen": args.seqlen}


def is_fresh(path: Path, settings: dict[str, Any], recipe: dict[str, Any] | None) -> bool:
    """Whether a result is there that measuring again would only repeat."""
    if not path.is_file():
        return False
    found = record.read_result(path)
    return found.get("settings") == settings and found.get("recipe") == recipe and record.stale(path) is None


def plain_ids_sha256(ids: Any) -> str:
    """sha256 of token ids as little-endian 64-bit integers, row after row, as in the peers' results.

    Args:
        ids: integer tensor ``[N, T]``.
    """
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def calibration_ids(args: argparse.Namespace) -> dict[str, Any]:
    """Which tokens calibrate, by both hashes in use."""
    import torch

    from bitfloor.data.sources import load_text
    from bitfloor.data.tokenize import calibration_batches, token_sha256
    from bitfloor.runtime.load import load_tokenizer

    batches = calibration_batches(
        load_tokenizer(args.model),
        load_text(args.calibration or str(record.data_file(args.data, CALIBRATION)), "calibration"),
        sequences=args.sequences,
        seqlen=args.calibration_seqlen,
        batch_size=args.sequences,
        min_chars=1500,
        pack=None if args.calibration else False,
    )
    return {
        "file": Path(args.calibration or CALIBRATION).name,
        "sequences": args.sequences,
        "seqlen": args.calibration_seqlen,
        "token_sha256": token_sha256(batches),
        "ids_sha256": plain_ids_sha256(torch.cat(batches)),
    }


def score(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of one model, packed or float, on every text, and the CPU seconds that took."""
    from bitfloor.data.sources import load_text
    from bitfloor.data.tokenize import evaluation_windows
    from bitfloor.evaluation.perplexity import perplexity
    from bitfloor.runtime.linear import cache_weights
    from bitfloor.runtime.load import load_model, load_tokenizer

    before = cost.cpu_seconds()
    tokenizer = load_tokenizer(args.model)
    loaded = load_model(model)
    cache_weights(loaded, True)  # the packed weights, decoded once; the products then are torch's own, in float32
    entries = {}
    for name, file, layout in TEXTS:
        source = load_text(f"{record.data_file(args.data, file)}:{layout}", "evaluation")
        windows = evaluation_windows(tokenizer, source, windows=args.windows, seqlen=args.seqlen)
        result = perplexity(loaded, windows)
        say(f"  {name}: {result.value:.4f}")
        entries[name] = {
            "file": Path(file).name,
            "layout": layout,
            "ppl": result.value,
            "windows": result.windows,
            "seqlen": result.seqlen,
            "tokens": result.tokens,
            "token_sha256": result.token_sha256,
            "ids_sha256": plain_ids_sha256(windows),
            "nll_per_window": list(result.nll_per_window),
        }
    del loaded
    gc.collect()
    return {"perplexity": entries, "evaluation": {"cpu_seconds": round(cost.cpu_seconds() - before, 1)}}


def quantize(preset: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize as a user would, from the beginning unless told to go on; sizes and cost."""
    text = record.data_file(args.data, CALIBRATION)
    log = out.with_name(f"{out.name}.cost") if args.resume else None
    if out.exists() and log is None:
        shutil.rmtree(out)
    # The text is named relative to its folder: the path is part of the recipe, and of its hash.
    line = ["quantize", args.model.resolve(), "--out", out.resolve(), "--recipe", preset]
    # Not --calib, which a method that reads no text refuses.
    line += [f"calibration.text={args.calibration or text.name}"]
    spent = cost.measure(
        cost.bitfloor_command(*line, *overrides_of(args)), log, cwd=text.parent, env=cost.source_environment()
    )
    report = json.loads((out / "bitfloor.json").read_text("utf-8"))
    sizes = {key: report[key] for key in ("bits_per_linear_weight", "bits_per_parameter", "bytes", "parameters")}
    made_from = {key: report["made_from"][key] for key in ("model", "calibration_tokens", "threads")}
    del spent["returncode"]
    if "allocation" in report:
        sizes["allocation"] = {k: v for k, v in report["allocation"].items() if k != "sha256"}
    return {**sizes, "made_from": made_from, "quantization": spent}


def float_sizes(model: Path) -> dict[str, Any]:
    """Sizes of the model at 16 bits a parameter: what it is distributed as, however the folder stores it."""
    from bitfloor import api

    planned = api.plan(model, "rtn-minmax-w4g64")
    count = planned["parameters"]
    return {
        "bits_per_linear_weight": 16.0,
        "bits_per_parameter": 16.0,
        "bytes": {"total": 2 * count},
        "parameters": count,
    }


def measure_float(args: argparse.Namespace) -> None:
    """Score the model as it is: a number that depends on no code of the package but the scoring."""
    path = args.out / f"{FLOAT}.json"
    settings = settings_of(args)
    if is_fresh(path, settings, None) and not args.force:
        say(f"{FLOAT}: fresh")
        return
    say(FLOAT)
    head = record.header(("evaluation/perplexity.py", "data/tokenize.py"))
    content = {**head, "name": FLOAT, "settings": settings, **float_sizes(args.model), **score(args.model, args)}
    record.write_result(path, content)


def measure_preset(preset: str, args: argparse.Namespace) -> None:
    """Quantize with one preset, score, write the result."""
    name = result_name(preset, args)
    path = args.out / f"{name}.json"
    calibration = args.calibration or Path(CALIBRATION).name
    overrides = overrides_of(args)
    recipe = {
        "preset": preset,
        "overrides": overrides,
        "calibration": calibration,
        "sha256": record.recipe_sha256(preset, overrides, calibration),
    }
    settings = settings_of(args)
    if is_fresh(path, settings, recipe) and not args.force:
        say(f"{name}: fresh")
        return
    say(name)
    head = record.header(record.parts_of(preset, overrides))
    out = args.work / name
    made = quantize(preset, out, args)
    say(f"  quantized in {made['quantization']['cpu_seconds']:.0f} CPU seconds")
    used = made["made_from"]["calibration_tokens"]
    tokens = None
    if used != "none":
        tokens = calibration_ids(args)
        if tokens["token_sha256"] != used:
            raise SystemExit(f"{name} was calibrated on other tokens ({used[:12]}) than this script would record")
    content = {
        **head,
        "name": name,
        "embedding_bits": args.embedding_bits,
        "settings": settings,
        "recipe": recipe,
        "calibration": tokens,
        **made,
        **score(out, args),
    }
    record.write_result(path, content)
    if not args.keep:
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f"{out.name}.cost"), ignore_errors=True)


def say(text: str) -> None:
    """Progress goes to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> None:
    """Measure what was asked for."""
    args = arguments()
    if not args.presets and not args.float:
        raise SystemExit("nothing to measure; name presets, or give --float")
    args.work.mkdir(parents=True, exist_ok=True)
    if args.float:
        measure_float(args)
    for preset in args.presets:
        measure_preset(preset, args)


if __name__ == "__main__":
    main()

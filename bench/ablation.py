"""What each part of a method is worth: variants of it on one block of a real model, judged on text it has not seen.

    python bench/ablation.py --model DIR --block 12 --bits 2

The blocks before are quantized by the fast preset at 4 bits: the block's input has drifted as it does in a run, but not
so far that nothing else could be seen. Then the block is quantized by each variant in turn, from the same inputs, and
everything behind it stays float. For each variant: CPU seconds of quantizing the block; relative squared error of its
output on the calibration text; and on text of two kinds that did not calibrate (documents of C4 after those that do,
WikiText-2's validation part) that error and the KL divergence of the next-token distribution from the float model's.

Texts: ``calib/c4_calibration.txt`` and ``wikitext2/wiki.valid.raw`` below the folder of the data (docs/measuring.md);
the texts of the yardstick are not touched, so choices may be made by what comes out. One thread is best: seconds of two
variants compare if nothing else ran.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import record

BEFORE = "bitfloor-fast-w4g64"
OWN = "bitfloor-w{bits}g64"
ADAM = ("method.optimizer=adamw", "method.rate=0.0025", "method.choose=true")
START = ("method.steps=0", "method.choose=true")
FIXED = "method.choose=false"
SIGN = ("method.optimizer=sign", "method.rate=0.005", "method.choose=true")
# Name, preset, overrides; {bits} is filled in.
WITH_ZERO = "spec.centred=0"
VARIANTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("round to nearest, min-max", "rtn-minmax-w{bits}g64", ()),
    ("round to nearest, searched", "rtn-w{bits}g64", ()),
    ("round to nearest, searched, rotated", "rtn-w{bits}g64", ("spec.rotation=64",)),
    ("signround, 200 steps", "signround-w{bits}g64", ()),
    ("signround, 200 steps, rotated", "signround-w{bits}g64", ("spec.rotation=64",)),
    ("start", OWN, START),
    ("start, correction 0.5 everywhere", OWN, (*START, FIXED)),
    ("start, not rotated", OWN, (*START, "spec.rotation=0")),
    ("start, rotated in blocks of 16", OWN, (*START, "spec.rotation=16")),
    ("start, rotated in blocks of 512", OWN, (*START, "spec.rotation=512")),
    ("start, zero among the levels", OWN, (*START, WITH_ZERO)),
    ("start, no correction", OWN, (*START, FIXED, "method.correction=0")),
    ("start, full correction", OWN, (*START, FIXED, "method.correction=1")),
    ("start, one pass a block", OWN, (*START, "method.sequential=false")),
    ("start, no sweeps", OWN, (*START, "method.sweeps=0")),
    ("start, 5 sweeps", OWN, (*START, "method.sweeps=5")),
    ("50 steps", OWN, (*ADAM, "method.steps=50", "method.rate=0.0035")),
    ("100 steps", OWN, ADAM),
    ("100 steps, not rotated", OWN, (*ADAM, "spec.rotation=0")),
    ("100 steps, nothing suppressed", OWN, (*ADAM, "method.suppress=0")),
    ("100 steps, zero among the levels", OWN, (*ADAM, WITH_ZERO)),
    ("100 steps, zero-points too", OWN, (*ADAM, WITH_ZERO, "method.zero_share=16")),
    ("100 steps, half as large", OWN, (*ADAM, "method.rate=0.00125")),
    ("100 steps, twice as large", OWN, (*ADAM, "method.rate=0.005")),
    ("100 steps, four times as large", OWN, (*ADAM, "method.rate=0.01")),
    ("100 steps, eight times as large", OWN, (*ADAM, "method.rate=0.02")),
    ("100 steps of the sign", OWN, SIGN),
    ("100 steps of the sign, twice as large", OWN, (*SIGN, "method.rate=0.01")),
    ("200 steps", OWN, (*ADAM, "method.steps=200")),
)
OMNI = "omniquant-w{bits}g64"
# Learned clipping, and the published schedule: 50 passes over the text, one sequence a step (run with --batch 1).
CLIPPING: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("round to nearest, min-max", "rtn-minmax-w{bits}g64", ()),
    ("round to nearest, searched", "rtn-w{bits}g64", ()),
    ("200 steps", OMNI, ()),
    ("200 steps at the published rate, constant", OMNI, ("method.rate=0.01", "method.decay=false")),
    ("200 steps at 0.03, constant", OMNI, ("method.rate=0.03", "method.decay=false")),
    ("200 steps, half as large", OMNI, ("method.rate=0.05",)),
    ("200 steps, one target", OMNI, ("method.both=false",)),
    ("1000 steps", OMNI, ("method.steps=1000",)),
)
CONSTANT = ("method.rate=0.01", "method.decay=false")
PUBLISHED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("50 passes, one sequence a step", OMNI, ("method.steps=6400", "method.check_every=320", *CONSTANT)),
)
FAMILIES = {"own": VARIANTS, "clipping": CLIPPING, "published": PUBLISHED}
CALIBRATION = "calib/c4_calibration.txt"
VALIDATION = "wikitext2/wiki.valid.raw"
SEQUENCES, SEQLEN, BATCH = 128, 256, 4
UNSEEN = 8  # sequences of each kind


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="own", help="which variants")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences a step")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these variants only; nothing is written")
    parser.add_argument("--try", dest="extra", action="append", default=[], metavar="NAME:PRESET[:KEY=VALUE,...]")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "ablation", help="folder for the results")
    return parser.parse_args(argv)


@dataclass
class Setting:
    """One block, its inputs in both models, and its outputs in the float model, for all texts.

    Args:
        source, index, runner, calls: the model, the block's number, the block, and its call arguments.
        exact, inputs, targets: ``[B, T, D]`` by batch: float inputs, quantized inputs, float outputs.
        texts: batches of each text by its name; ``calibration`` is one.
        ids: token ids by batch.
    """

    source: Any
    index: int
    runner: Any
    calls: list[Any]
    exact: list[Any]
    inputs: list[Any]
    targets: list[Any]
    texts: dict[str, range]
    ids: list[Any]
    last: dict[int, Any] = field(default_factory=dict)  # the float model's last hidden states, once they are known


def load_ids(args: argparse.Namespace) -> tuple[list[Any], dict[str, range]]:
    """Batches of token ids, and which of them are of which text."""
    import torch

    from bitfloor.data.sources import load_text
    from bitfloor.data.tokenize import calibration_batches, evaluation_windows
    from bitfloor.runtime.load import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    c4 = load_text(str(record.data_file(args.data, CALIBRATION)), "calibration")
    count = SEQUENCES + UNSEEN
    read = calibration_batches(tokenizer, c4, sequences=count, seqlen=SEQLEN, batch_size=args.batch, pack=False)
    documents = torch.cat(read)
    wiki = load_text(f"{record.data_file(args.data, VALIDATION)}:whole", "evaluation")
    running = evaluation_windows(tokenizer, wiki, windows=UNSEEN, seqlen=SEQLEN)
    ids = [*documents.split(args.batch), *running.split(args.batch)]
    first, second = SEQUENCES // args.batch, (SEQUENCES + UNSEEN) // args.batch
    texts = {"calibration": range(first), "c4": range(first, second), "wiki": range(second, len(ids))}
    return ids, texts


Before = Callable[[Any, Any, list[Any]], Mapping[str, Any]]


def by_fast_preset(source: Any) -> Before:
    """Quantizes a block, given its inputs, by the fast preset at 4 bits."""
    from bitfloor.core.packed import dequantize
    from bitfloor.recipe.job import make_job
    from bitfloor.recipe.load import load_recipe

    job = make_job(load_recipe(BEFORE), source)

    def dense(runner: Any, refs: Any, inputs: list[Any]) -> Mapping[str, Any]:
        specs = {ref.name: spec for ref in refs if (spec := job.decide(ref.name)[0])}
        made = job.method.quantize_block(runner, inputs[: max(1, 32 // inputs[0].shape[0])], specs)
        return {name: dequantize(weight) for name, weight in made.weights.items()}

    return dense


def prepare(args: argparse.Namespace, before: Callable[[Any], Before] = by_fast_preset) -> Setting:
    """Lead both streams to the block, through blocks with other weights in the second one.

    Args:
        args: of the command line.
        before: made with the model; gives the weights of a block's matrices by name, from runner, matrices and inputs.
    """
    import torch

    from bitfloor.calib.block import BlockRunner
    from bitfloor.calib.capture import capture
    from bitfloor.modeling.loader import open_source
    from bitfloor.recipe.job import make_job
    from bitfloor.recipe.load import load_recipe

    ids, texts = load_ids(args)
    source = open_source(args.model)
    source.load_outer(head=False)
    captured = capture(source.skeleton, source.map.blocks_path, ids)
    source.release_outer()
    exact = list(captured.hidden)
    inputs = list(exact)
    products, replaced = make_job(load_recipe(BEFORE), source).products, before(source)
    with torch.no_grad():
        for k in range(args.block + 1):
            block, refs = source.load_block(k), source.map.block_matrices(k)
            runner = BlockRunner(block, source.map.block_path(k), refs, captured.calls[k], products)
            targets = [runner.forward(x, i) for i, x in enumerate(exact)]
            if k == args.block:
                break
            weights = runner.prepare(replaced(runner, refs, inputs))
            inputs = [runner.forward(x, i, weights) for i, x in enumerate(inputs)]
            exact = targets
            source.release_block(k)
    return Setting(source, args.block, runner, captured.calls, exact, inputs, targets, texts, ids)


def quantize(setting: Setting, preset: str, overrides: Sequence[str]) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """The block by one variant: dense weights by name, CPU seconds, and how learning went."""
    import torch

    from bitfloor.core.packed import dequantize
    from bitfloor.methods.base import Need
    from bitfloor.recipe.job import make_job
    from bitfloor.recipe.load import load_recipe

    job = make_job(load_recipe(preset, list(overrides)), setting.source)
    runner = setting.runner
    runner.products = job.products
    specs = {name: spec for name in runner.names if (spec := job.decide(name)[0])}
    text = setting.texts["calibration"]
    needs = job.method.needs
    exact = [setting.exact[i] for i in text] if Need.EXACT in needs else []
    targets = [setting.targets[i] for i in text] if Need.TARGETS in needs else []
    inputs = [setting.inputs[i] for i in text] if Need.INPUTS in needs else []
    began = time.process_time()
    with torch.no_grad():
        result = job.method.quantize_block(runner, inputs, specs, exact, targets)
    seconds = time.process_time() - began
    learning = result.learning
    told = {} if learning is None else {"step": learning.step, "loss": [learning.before, learning.after]}
    return {name: dequantize(weight) for name, weight in result.weights.items()}, seconds, told


def judge(setting: Setting, weights: dict[str, Any]) -> dict[str, Any]:
    """Relative squared error by text, and the KL divergence on those that did not calibrate."""
    import torch

    runner = setting.runner
    found: dict[str, Any] = {}
    outputs = {}
    with torch.no_grad():
        replaced = runner.prepare(weights)
        for name, text in setting.texts.items():
            above = below = 0.0
            for i in text:
                output = runner.forward(setting.inputs[i], i, replaced)
                # The last position predicts nothing, the first is a thousand times louder than the rest.
                off, aim = (output - setting.targets[i])[:, 1:-1], setting.targets[i][:, 1:-1]
                above += float(off.square().sum(dtype=torch.float64))
                below += float(aim.square().sum(dtype=torch.float64))
                outputs[i] = output
            found[f"error_{name}"] = above / below
    unseen = {name: text for name, text in setting.texts.items() if name != "calibration"}
    divergences = tail_divergence(setting, {i: outputs[i] for text in unseen.values() for i in text})
    for name, text in unseen.items():
        found[f"kl_{name}"] = sum(divergences[i] for i in text) / len(text)
    return found


def tail_divergence(setting: Setting, outputs: dict[int, Any]) -> dict[int, float]:
    """Mean KL divergence by batch from the float model to one that goes on, float, from other outputs of the block."""
    import torch

    from bitfloor.calib.block import BlockRunner
    from bitfloor.calib.capture import run_tail

    source = setting.source
    states = dict(outputs)
    known = bool(setting.last)
    if not known:
        setting.last = {i: setting.targets[i] for i in outputs}
    for k in range(setting.index + 1, source.map.n_blocks):
        runner = BlockRunner(
            source.load_block(k),
            source.map.block_path(k),
            source.map.block_matrices(k),
            setting.calls[k],
            setting.runner.products,
        )
        with torch.no_grad():
            states = {i: runner.forward(state, i) for i, state in states.items()}
            if not known:
                setting.last = {i: runner.forward(state, i) for i, state in setting.last.items()}
        source.release_block(k)
    source.load_outer()
    found = {}
    for i, state in states.items():
        logs = [
            run_tail(source.skeleton, source.map.blocks_path, setting.ids[i], hidden)[:, :-1].log_softmax(-1)
            for hidden in (setting.last[i], state)
        ]
        found[i] = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    source.release_outer()
    return found


def chosen(args: argparse.Namespace) -> list[tuple[str, str, tuple[str, ...]]]:
    """The variants to run."""
    extra = []
    for text in args.extra:
        name, preset, *rest = text.split(":", 2)
        extra.append((name, preset, tuple(rest[0].split(",")) if rest else ()))
    known = FAMILIES[args.family]
    if args.only is None:
        return [*known, *extra]
    unknown = sorted(set(args.only) - {name for name, _, _ in known})
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is no variant; there are: {', '.join(name for name, _, _ in known)}")
    return [*(variant for variant in known if variant[0] in args.only), *extra]


def main() -> None:
    """Run the variants; write the result if they are all of them."""
    args = arguments()
    variants = chosen(args)
    setting = prepare(args)
    methods = ("bitfloor", "signround", "rtn") if args.family == "own" else ("omniquant", "rtn", "bitfloor")
    head = record.header(tuple(sorted({part for name in methods for part in record.quality(name)})))
    rows = []
    for name, preset, overrides in variants:
        weights, seconds, told = quantize(setting, preset.format(bits=args.bits), overrides)
        row = {"name": name, "preset": preset.format(bits=args.bits), "overrides": list(overrides)}
        rows.append({**row, "cpu_seconds": round(seconds, 2), **judge(setting, weights), **told})
        numbers = " ".join(f"{k} {v:.4f}" for k, v in rows[-1].items() if isinstance(v, float) and k != "cpu_seconds")
        sys.stdout.write(f"{name:32s} {seconds:6.1f} s  {numbers}\n")
        sys.stdout.flush()
    if args.only is None and not args.extra:
        content = {"model": args.model.resolve().name, "block": args.block, "bits": args.bits, "variants": rows}
        name = f"block{args.block}-w{args.bits}" if args.family == "own" else f"{args.family}-w{args.bits}"
        record.write_result(args.out / f"{name}.json", {**head, **content})


if __name__ == "__main__":
    main()

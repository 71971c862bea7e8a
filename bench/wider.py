"""Two ideas that go beyond one block and its plain loss, tried on one place of a real model.

    python bench/wider.py --model DIR --block 12 --bits 2

*Windows.* Two neighbouring blocks are learnt one after the other, as the pipeline does, or both at once towards the
output of the second. *Weights.* The loss of a block weighs each hidden channel by how much the next-token loss reacts
to it: the mean square of its gradient, which is the diagonal of the empirical Fisher matrix.

Set-up, texts and judgement are those of ``ablation.py``: the blocks before are quantized at 4 bits, those
behind stay float, and what counts is the KL divergence on text of two kinds that did not calibrate.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ablation
import record


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--block", type=int, default=12, help="the first of the two")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=2)
    parser.add_argument("--batch", type=int, default=ablation.BATCH, help="sequences a step")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "ablation", help="folder for the results")
    return parser.parse_args(argv)


class Pair:
    """Two blocks as one, for learning: the names of their matrices differ."""

    def __init__(self, first: Any, second: Any) -> None:
        self.blocks = (first, second)

    def forward(self, x: Any, batch: int, overrides: dict[str, Any] | None = None) -> Any:
        """The second block's output on what the first makes of ``x``."""
        for block in self.blocks:
            x = block.forward(x, batch, {n: w for n, w in (overrides or {}).items() if n in block.names})
        return x


def job_of(setting: Any, bits: int, *overrides: str) -> Any:
    """bitfloor's own preset, as a job on the model."""
    from bitfloor.recipe.job import make_job
    from bitfloor.recipe.load import load_recipe

    return make_job(load_recipe(f"bitfloor-w{bits}g64", list(overrides)), setting.source)


def starts(runner: Any, job: Any, inputs: list[Any], exact: list[Any]) -> dict[str, Any]:
    """Packed matrices of a block's start."""
    specs = {name: spec for name in runner.names if (spec := job.decide(name)[0])}
    found: dict[str, Any] = job.method._start.quantize_block(runner, inputs, specs, exact).weights
    return found


def learn(block: Any, runners: Sequence[Any], packed: dict[str, Any], job: Any, loss_of: Callable[..., Any]) -> Any:
    """Dense matrices after the preset's steps from a start, all of them at once."""
    from bitfloor.core.affine import pack
    from bitfloor.core.basis import basis_of
    from bitfloor.core.packed import dequantize
    from bitfloor.core.rotation import rotate
    from bitfloor.methods.bitfloor import SCALE_SHARE, codes_and_grids
    from bitfloor.methods.learning import FIXED_BATCHES, spread, turned
    from bitfloor.solvers.adamw import AdamW
    from bitfloor.solvers.block_opt import Schedule, optimise
    from bitfloor.solvers.refine import Refinement

    config, learnt = job.method.config, {}
    for runner in runners:
        for name in runner.names:
            if name in packed:
                spec = job.decide(name)[0]
                weight = rotate(runner.weight(name), spec.rotation)
                adam = AdamW() if config.optimizer == "adamw" else None
                learnt[name] = turned(Refinement(weight, *codes_and_grids(packed[name], spec)[0], adam=adam), spec)
    loss, count = loss_of(block)
    schedule = Schedule(config.steps, config.rate, SCALE_SHARE * config.rate)
    outcome = optimise(learnt, loss, range(count), spread(range(count), FIXED_BATCHES), schedule)
    return {n: dequantize(pack(*best, basis_of(job.decide(n)[0]))) for n, best in outcome.best.items()}


def plain_loss(inputs: list[Any], targets: list[Any], suppress: float, weights: Any = None) -> Callable[..., Any]:
    """The preset's loss, or the same with a weight for every channel."""
    from bitfloor.methods.learning import mean_square

    def loss_of(block: Any) -> tuple[Callable[..., Any], int]:
        def loss(batch: int, overrides: Any) -> Any:
            difference = (block.forward(inputs[batch], batch, overrides) - targets[batch])[:, :-1]
            return mean_square(difference if weights is None else difference * weights.sqrt(), suppress)

        return loss, len(inputs)

    return loss_of


def sensitivities(setting: Any, batches: Sequence[int]) -> Any:
    """Mean square of the next-token loss's gradient by channel of the block's output, mean one: ``[D]``."""
    import torch
    import torch.nn.functional as F

    from bitfloor.calib.block import BlockRunner
    from bitfloor.pipeline.student import Head, gives_tuple

    source = setting.source
    states = {i: [setting.targets[i]] for i in batches}
    runners = []
    for k in range(setting.index + 1, source.map.n_blocks):
        block, refs = source.load_block(k), source.map.block_matrices(k)
        runners.append(BlockRunner(block, source.map.block_path(k), refs, setting.calls[k], setting.runner.products))
    source.load_outer()
    as_tuple = gives_tuple(source, setting.ids[batches[0]], "cpu")
    head = Head(source, torch.float32, as_tuple=as_tuple)
    total = 0.0
    for i in batches:
        with torch.enable_grad():
            hidden = states[i][0].detach().requires_grad_()
            x = hidden
            for runner in runners:
                x = runner.forward(x, i)
            logits = head.logits(setting.ids[i], x, {})[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), setting.ids[i][:, 1:].flatten(), reduction="sum").backward()
        total = total + hidden.grad[:, 1:-1].square().sum((0, 1), dtype=torch.float64)
    for k in range(setting.index + 1, source.map.n_blocks):
        source.release_block(k)
    source.release_outer()
    weights = total.float()
    return weights / weights.mean()


def main() -> None:
    """Run both experiments and write what came out."""
    import torch

    from bitfloor.calib.block import BlockRunner
    from bitfloor.core.packed import dequantize

    args = arguments()
    setting = ablation.prepare(args)
    job = job_of(setting, args.bits)
    suppress = job.method.config.suppress
    source, first = setting.source, setting.runner
    first.products = job.products
    text = list(setting.texts["calibration"])
    inputs, exact, targets = ([rows[i] for i in text] for rows in (setting.inputs, setting.exact, setting.targets))
    rows: list[dict[str, Any]] = []

    def note(name: str, seconds: float, where: Any, weights: dict[str, Any]) -> None:
        rows.append({"name": name, "cpu_seconds": round(seconds, 2), **ablation.judge(where, weights)})
        kept = " ".join(f"{key} {value:.4f}" for key, value in rows[-1].items() if key.startswith(("error", "kl")))
        sys.stdout.write(f"{name:44s} {seconds:6.1f} s  {kept}\n")
        sys.stdout.flush()

    with torch.no_grad():
        began = time.process_time()
        own = starts(first, job, inputs, exact)
        to_start = time.process_time() - began
        began = time.process_time()
        alone = learn(first, [first], own, job, plain_loss(inputs, targets, suppress))
        to_learn = time.process_time() - began
        note("one block", to_start + to_learn, setting, alone)
        fisher = sensitivities(setting, list(setting.texts["calibration"])[::4])
        for name, power in (("one block, weighed by sensitivity", 1.0), ("one block, by its square root", 0.5)):
            weighed = learn(first, [first], own, job, plain_loss(inputs, targets, suppress, fisher**power))
            note(name, to_start + to_learn, setting, weighed)

        # The second block, seen from the first quantized one.
        k = setting.index + 1
        module, refs = source.load_block(k), source.map.block_matrices(k)
        second = BlockRunner(module, source.map.block_path(k), refs, setting.calls[k], job.products)
        every = range(len(setting.inputs))
        replaced = first.prepare(alone)
        behind = copy.copy(setting)
        behind.index, behind.runner, behind.last = k, second, {}
        behind.exact = setting.targets
        behind.targets = [second.forward(setting.targets[i], i) for i in every]
        behind.inputs = [first.forward(setting.inputs[i], i, replaced) for i in every]
        between, aims = [behind.inputs[i] for i in text], [behind.targets[i] for i in text]
        began = time.process_time()
        other = starts(second, job, between, targets)
        after = learn(second, [second], other, job, plain_loss(between, aims, suppress))
        one_by_one = to_start + to_learn + time.process_time() - began
        note("two blocks, one after the other", one_by_one, behind, after)

        pair = Pair(first, second)
        begun = {name: dequantize(weight) for name, weight in own.items()}
        replaced = first.prepare(begun)
        middle = [first.forward(x, i, replaced) for x, i in zip(inputs, text, strict=True)]
        began = time.process_time()
        other = starts(second, job, middle, targets)
        both = learn(pair, [first, second], {**own, **other}, job, plain_loss(inputs, aims, suppress))
        seconds = to_start + time.process_time() - began
        whole = copy.copy(behind)
        replaced = first.prepare({name: both[name] for name in own})
        whole.inputs = [first.forward(setting.inputs[i], i, replaced) for i in every]
        note("two blocks at once", seconds, whole, {name: both[name] for name in other})
    parts = tuple(sorted({*record.quality("bitfloor"), "pipeline/student.py"}))
    content = {"model": args.model.resolve().name, "block": args.block, "bits": args.bits, "variants": rows}
    record.write_result(args.out / f"wider-block{args.block}-w{args.bits}.json", {**record.header(parts), **content})


if __name__ == "__main__":
    main()

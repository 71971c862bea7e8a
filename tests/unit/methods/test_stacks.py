"""Experts of one parameter are learnt as one matrix, and that changes nothing but the number of calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pico import pico_model, token_batches

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import capture
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import BlockResult
from bitfloor.methods.bitfloor import Bitfloor
from bitfloor.methods.learning import units
from bitfloor.methods.omniquant import Omniquant
from bitfloor.methods.options import BitfloorConfig, OmniquantConfig, SignroundConfig
from bitfloor.methods.signround import Signround
from bitfloor.modeling.discover import describe
from bitfloor.solvers.signround import SignRound

STEPS = 24
OWN = BitfloorConfig(steps=STEPS, rate=0.01, suppress=0.0, correction=0.0, sweeps=0)
METHODS = (
    Signround(SignroundConfig(steps=STEPS, rate=0.05)),
    Bitfloor(replace(OWN, optimizer="adamw", rate=0.002)),
    Bitfloor(replace(OWN, zero_share=16.0)),
    Omniquant(OmniquantConfig(steps=STEPS, rate=0.05)),
)


class OneByOne(BlockRunner):
    """A block that does not know of its stacks."""

    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        return {}


def run(method: Any, name: str, kind: type[BlockRunner], change: Mapping[str, QuantSpec | None] = {}) -> BlockResult:
    """The first block of a pico model by a method, its inputs drifted a little."""
    model = pico_model(name).requires_grad_(False)
    parts = describe(model)
    seen = capture(model, parts.blocks_path, token_batches(3))
    path = parts.block_path(0)
    runner = kind(model.get_submodule(path), path, parts.block_matrices(0), seen.calls[0])
    specs = dict.fromkeys(runner.names, QuantSpec(3, 8, rotation=4)) | change
    with torch.no_grad():
        targets = [runner.forward(x, i) for i, x in enumerate(seen.hidden)]
        drifted = [0.7 * x for x in seen.hidden]
        wanted = {n: spec for n, spec in specs.items() if spec}
        return method.quantize_block(runner, drifted, wanted, seen.hidden, targets)


def same(one: BlockResult, other: BlockResult) -> bool:
    return list(one.weights) == list(other.weights) and all(
        torch.equal(dequantize(one.weights[name]), dequantize(other.weights[name])) for name in one.weights
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])  # the last one stores [E, I, O]
@pytest.mark.parametrize("method", METHODS, ids=["signround", "adamw", "zero-points", "omniquant"])
def test_a_stack_learns_what_its_experts_learn_one_by_one(method: Any, name: str) -> None:
    together, single = run(method, name, BlockRunner), run(method, name, OneByOne)
    assert same(together, single)
    assert together.learning == single.learning and together.learning is not None and together.learning.step > 0


def test_a_stack_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    before = SignRound.__init__

    def note(self: SignRound, weight: torch.Tensor, *args: Any, **options: Any) -> None:
        made.append(weight.shape)
        before(self, weight, *args, **options)

    monkeypatch.setattr(SignRound, "__init__", note)
    run(METHODS[0], "mixtral", BlockRunner)
    few = list(made)
    made.clear()
    run(METHODS[0], "mixtral", OneByOne)
    assert len(few) == 6 and len(made) == 4 + 2 * 4
    assert sum(shape.numel() for shape in few) == sum(shape.numel() for shape in made)


@pytest.mark.parametrize("other", [QuantSpec(4, 8, rotation=4), None])
def test_experts_stored_in_different_ways_are_learnt_one_by_one(other: QuantSpec | None) -> None:
    one = "model.layers.0.mlp.experts.2.down_proj"
    together, single = (run(METHODS[0], "mixtral", kind, {one: other}) for kind in (BlockRunner, OneByOne))
    assert same(together, single) and (one in together.weights) is (other is not None)


def test_a_stack_is_its_experts_row_below_row() -> None:
    model = pico_model("gpt_oss").requires_grad_(False)
    parts = describe(model)
    seen = capture(model, parts.blocks_path, token_batches(1))
    path = parts.block_path(0)
    runner = BlockRunner(model.get_submodule(path), path, parts.block_matrices(0), seen.calls[0])
    stack, names = next(iter(runner.stacks().items()))
    tall = runner.weight(stack)
    assert torch.equal(tall, torch.cat([runner.weight(name) for name in names]))
    with torch.no_grad():
        changed = {name: runner.weight(name).round(decimals=1) for name in names}
        one = runner.forward(seen.hidden[0], 0, changed)
        other = runner.forward(seen.hidden[0], 0, {stack: torch.cat(list(changed.values()))})
    assert torch.equal(one, other)
    spec = QuantSpec(3, 8)
    assert units(runner, dict.fromkeys(names, spec)) == {stack: names}
    assert units(runner, dict.fromkeys(names[1:], spec)) == {name: (name,) for name in names[1:]}


def test_the_seed_is_the_order_of_the_batches() -> None:
    for kind, config in ((Signround, SignroundConfig(steps=STEPS, rate=0.05)), (Bitfloor, OWN)):
        runs = [run(kind(config, seed), "mixtral", BlockRunner) for seed in (0, 0, 1)]
        assert same(runs[0], runs[1]) and not same(runs[0], runs[2])

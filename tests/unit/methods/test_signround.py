"""SignRound over a block: where it starts, what it compares, and what becomes of input that is no pleasure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.methods.toy_block import ToyBlock, batches, outputs

from bitfloor.core.errors import InputError
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, BlockResult, Need
from bitfloor.methods.options import RtnConfig, SignroundConfig
from bitfloor.methods.rtn import Rtn
from bitfloor.methods.signround import Signround

NAMES = ("a", "b", "c")


def learn(block: ToyBlock, inputs: Batches, specs: Mapping[str, QuantSpec], **options: Any) -> BlockResult:
    """SignRound with the float model's inputs equal to the quantized model's."""
    return Signround(SignroundConfig(**options)).quantize_block(block, inputs, specs, (), outputs(block, list(inputs)))


def block_error(block: ToyBlock, result: BlockResult, inputs: Batches, targets: Batches | None = None) -> float:
    weights = {name: dequantize(weight) for name, weight in result.weights.items()}
    pairs = zip(inputs, inputs if targets is None else targets, strict=True)
    return sum(
        float((block.forward(x, 0, weights) - block.forward(exact, 0))[:, :-1].square().sum()) for x, exact in pairs
    )


def same(one: BlockResult, other: BlockResult) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(dequantize(one.weights[name]), dequantize(other.weights[name])) for name in one.weights
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_steps_are_round_to_nearest_and_steps_improve_on_it(bits: int, symmetric: bool) -> None:
    block, inputs = ToyBlock(), batches()
    specs = {name: QuantSpec(bits, 16, symmetric) for name in NAMES}
    rounded = Rtn(RtnConfig("minmax")).quantize_block(block, (), specs)
    assert same(learn(block, inputs, specs, steps=0), rounded)
    learned = learn(block, inputs, specs, steps=60)
    # A step of the ranges is a share of the whole range: at 8 bits it passes over several codes and finds little.
    limit = 1.0 if bits == 8 else 0.8
    assert block_error(block, learned, inputs) <= limit * block_error(block, rounded, inputs)
    assert set(learned.reports) == set(NAMES) and all(r.note is None for r in learned.reports.values())


def test_it_aims_at_the_float_models_output_from_the_quantized_models_input() -> None:
    """The input's drift is made up for; aiming at the output on the drifted input would keep it."""
    block, exact = ToyBlock(), batches()
    drifted = [0.8 * x for x in exact]
    specs = {name: QuantSpec(4, 8) for name in NAMES}
    method = Signround(SignroundConfig(steps=60, rate=0.05))
    assert method.needs == {Need.INPUTS, Need.TARGETS, Need.GRADIENTS}
    aimed = method.quantize_block(block, drifted, specs, (), outputs(block, exact))
    kept = method.quantize_block(block, drifted, specs, (), outputs(block, drifted))
    assert block_error(block, aimed, drifted, exact) < 0.9 * block_error(block, kept, drifted, exact)


def test_the_last_position_is_not_compared() -> None:
    block, inputs = ToyBlock(), batches()
    specs = {name: QuantSpec(3, 8) for name in NAMES}
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, -1] *= 100.0
    assert same(learn(block, inputs, specs, steps=8), learn(block, changed, specs, steps=8))


def test_only_what_is_wanted_is_learned_and_twice_the_same() -> None:
    block, inputs = ToyBlock(), batches()
    specs = {"a": QuantSpec(2, 8), "c": QuantSpec(4, -1, True)}
    first = learn(block, inputs, specs, steps=12)
    assert set(first.weights) == set(first.reports) == {"a", "c"}
    assert same(first, learn(block, inputs, specs, steps=12))
    assert learn(block, inputs, {}).weights == {}


def test_experts_learn_from_their_tokens_and_those_without_any_are_rounded() -> None:
    block, inputs = ToyBlock(routes=[0, 1, 1] * 10, experts=3), batches()
    specs = {name: QuantSpec(2, 8) for name in block.weights}
    learned = learn(block, inputs, specs, steps=30)
    rounded = Rtn(RtnConfig("minmax")).quantize_block(block, (), specs)
    for name, moved in {"up.0": True, "down.1": True, "up.2": False, "down.2": False}.items():
        alike = torch.equal(dequantize(learned.weights[name]), dequantize(rounded.weights[name]))
        assert alike is not moved


def outliers(x: Tensor) -> Tensor:
    return x * torch.where(torch.arange(x.shape[-1]) == 3, 1e4, 1.0)


@pytest.mark.parametrize(
    "change", [torch.zeros_like, lambda x: x[:1, :1].expand_as(x), outliers], ids=["zero", "identical", "outliers"]
)
def test_strange_text_never_makes_it_worse_than_rounding(change: Any) -> None:
    block, inputs = ToyBlock(), [change(x) for x in batches()]
    specs = {name: QuantSpec(2, 8) for name in NAMES}
    rounded = Rtn(RtnConfig("minmax")).quantize_block(block, (), specs)
    learned = learn(block, inputs, specs, steps=20, check_every=5)
    assert block_error(block, learned, inputs) <= block_error(block, rounded, inputs)


def test_a_loss_that_overflows_keeps_the_start_and_says_so_once() -> None:
    block, inputs = ToyBlock(), [1e30 * x for x in batches()]
    specs = {name: QuantSpec(2, 8) for name in NAMES}
    learned = learn(block, inputs, specs, steps=20)
    assert same(learned, Rtn(RtnConfig("minmax")).quantize_block(block, (), specs))
    notes = [report.note for report in learned.reports.values() if report.note]
    assert len(notes) == 1 and "the loss is not finite at the start" in notes[0]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_few_steps_and_few_batches_are_enough(steps: int, count: int) -> None:
    block, inputs = ToyBlock(), batches(count)
    learned = learn(block, inputs, {"a": QuantSpec(3, 7)}, steps=steps)
    rounded = learn(block, inputs, {"a": QuantSpec(3, 7)}, steps=0)
    assert block_error(block, learned, inputs) <= block_error(block, rounded, inputs)


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"rate": 1.5}, {"range_rate": -0.1}, {"accumulate": 0}, {"check_every": 0}]
    + [{"patience": 0}, {"rate": float("nan")}],
)
def test_options_outside_their_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SignroundConfig(**options)

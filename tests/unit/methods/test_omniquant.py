"""OmniQuant over a block: where it starts, what it compares, its rate, and widths that differ from group to group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.methods.toy_block import ToyBlock, batches, outputs

from bitfloor.core.errors import InputError
from bitfloor.core.packed import dequantize
from bitfloor.core.rotation import rotate
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, BlockResult, Need
from bitfloor.methods.learning import Objective, learn_block
from bitfloor.methods.omniquant import Omniquant, clipped
from bitfloor.methods.options import OmniquantConfig
from bitfloor.solvers.block_opt import Schedule
from bitfloor.solvers.clipping import Clipping

NAMES = ("a", "b", "c")
MIXED = QuantSpec(2, 8, widths=(3, 1, 2))


def learn(block: ToyBlock, inputs: Batches, specs: Mapping[str, QuantSpec], **options: Any) -> BlockResult:
    """OmniQuant with the float model's inputs equal to the quantized model's."""
    return Omniquant(OmniquantConfig(**options)).quantize_block(block, inputs, specs, (), outputs(block, list(inputs)))


def block_error(block: ToyBlock, result: BlockResult, inputs: Batches, targets: Batches) -> float:
    weights = {name: dequantize(weight) for name, weight in result.weights.items()}
    pairs = zip(inputs, targets, strict=True)
    return sum(float((block.forward(x, 0, weights) - aim)[:, :-1].square().sum()) for x, aim in pairs)


def same(one: BlockResult, other: BlockResult) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(dequantize(one.weights[name]), dequantize(other.weights[name])) for name in one.weights
    )


@pytest.mark.parametrize("spec", [QuantSpec(1, 8), QuantSpec(2, 8), QuantSpec(3, 16), QuantSpec(2, 8, True)], ids=str)
def test_steps_come_nearer_than_the_start(spec: QuantSpec) -> None:
    block, inputs = ToyBlock(), batches()
    start, learned = (learn(block, inputs, dict.fromkeys(NAMES, spec), steps=steps, rate=0.03) for steps in (0, 100))
    aims = outputs(block, inputs)
    assert block_error(block, learned, inputs, aims) < 0.9 * block_error(block, start, inputs, aims)
    assert start.learning is not None and learned.learning is not None
    assert start.learning.after == start.learning.before == learned.learning.before > learned.learning.after
    assert learned.learning.step > 0
    assert set(learned.reports) == set(NAMES) and all(r.note is None for r in learned.reports.values())


@pytest.mark.parametrize("rotation", [0, 8])
def test_no_steps_keep_the_start_of_every_width(rotation: int) -> None:
    block, inputs = ToyBlock(), batches()
    spec = QuantSpec(2, 8, rotation=rotation, widths=MIXED.widths)
    result = learn(block, inputs, {"a": spec, "b": spec}, steps=0)
    for name in ("a", "b"):
        found, weight = dequantize(result.weights[name]), rotate(block.weight(name), rotation)
        parts = zip(weight.split(8, 1), spec.widths, strict=True)
        alone = [clipped(part.contiguous(), QuantSpec(bits, 8)).fake_quantized() for part, bits in parts]
        assert torch.equal(found, rotate(torch.cat(alone, 1), rotation))


def test_groups_of_every_width_learn() -> None:
    block, inputs = ToyBlock(), batches()
    specs = {"a": MIXED, "b": MIXED, "c": QuantSpec(2, 8, widths=(1, 2, 3, 2, 2))}
    start, learned = (learn(block, inputs, specs, steps=steps) for steps in (0, 60))
    aims = outputs(block, inputs)
    assert block_error(block, learned, inputs, aims) < 0.9 * block_error(block, start, inputs, aims)
    for name, spec in specs.items():
        one, other = dequantize(start.weights[name]), dequantize(learned.weights[name])
        for g, bits in enumerate(spec.widths):
            at = slice(8 * g, 8 * g + 8)
            assert not torch.equal(one[:, at], other[:, at])
            assert all(len(row.unique()) <= 1 << bits for row in other[:, at])


def test_it_aims_at_the_float_models_output_and_at_the_float_blocks_on_the_same_input() -> None:
    """Drifted inputs: with one target the drift is made up for; the other one counts what the block itself changes."""
    block, exact = ToyBlock(), batches()
    drifted = [0.8 * x for x in exact]
    specs = dict.fromkeys(NAMES, QuantSpec(3, 8))
    first, second = outputs(block, exact), outputs(block, drifted)
    results = {
        both: Omniquant(OmniquantConfig(steps=200, both=both, rate=0.03)).quantize_block(
            block, drifted, specs, (), first
        )
        for both in (False, True)
    }
    errors = {
        both: [block_error(block, found, drifted, aim) for aim in (first, second)] for both, found in results.items()
    }
    assert errors[True][0] > errors[False][0] and errors[True][1] < 0.9 * errors[False][1]
    for both, found in results.items():
        # What is reported is the loss itself: means over what is compared.
        count = sum(x[:, :-1].numel() for x in drifted)
        assert found.learning is not None
        assert found.learning.after == pytest.approx(sum(errors[both][: 1 + both]) / count, rel=1e-4)


class Counting(ToyBlock):
    """Notes every forward: whether matrices are replaced, and whether it is recorded for the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, batch: int, overrides: Mapping[str, Tensor] | None = None) -> Tensor:
        self.runs.append((bool(overrides), torch.is_grad_enabled()))
        return super().forward(x, batch, overrides)


@pytest.mark.parametrize("both", [False, True])
def test_the_second_target_is_a_forward_without_gradients(both: bool) -> None:
    block, inputs = Counting(), batches()
    learn(block, inputs, {"a": QuantSpec(2, 8)}, steps=4, both=both, check_every=100)
    runs = block.runs[len(inputs) :]  # those that made the targets
    # Four steps; three fixed batches looked at before and after.
    assert runs.count((True, True)) == 4 and runs.count((True, False)) == 6
    assert runs.count((False, False)) == (10 if both else 0) and runs.count((False, True)) == 0


class Rates(Clipping):
    """Notes its rates."""

    def __init__(self, weight: Tensor, spec: QuantSpec) -> None:
        super().__init__(weight, spec)
        self.seen: list[float] = []

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        self.seen.append(range_rate)
        super().step(grad, rate, range_rate)


@pytest.mark.parametrize("decay", [False, True])
def test_the_rate_stays_or_falls_linearly(decay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Rates] = []

    def noting(weight: Tensor, spec: QuantSpec, _: int = 0) -> Rates:
        made.append(Rates(weight, spec))
        return made[-1]

    monkeypatch.setattr("bitfloor.methods.omniquant.clipped", noting)
    learn(ToyBlock(), batches(), {"a": QuantSpec(2, 8)}, steps=5, rate=0.02, decay=decay)
    expected = [0.02 * (1 - t / 5) for t in range(5)] if decay else [0.02] * 5
    assert made[0].seen == pytest.approx(expected, rel=1e-12)


def test_one_target_is_what_other_methods_learn_from() -> None:
    """``both`` adds a part to the loss and leaves the other as it is."""
    block, inputs = ToyBlock(), batches()
    drifted, spec = [0.9 * x for x in inputs], QuantSpec(2, 8)

    def before(both: bool, targets: list[Tensor]) -> float:
        learnt = {name: clipped(block.weight(name), spec) for name in NAMES}
        return learn_block(block, drifted, targets, learnt, Schedule(steps=0), Objective(both=both)).before

    far, near = outputs(block, inputs), outputs(block, drifted)
    assert before(True, far) == pytest.approx(before(False, far) + before(False, near), rel=1e-5)


def test_only_what_is_wanted_is_learned_and_twice_the_same() -> None:
    block, inputs = ToyBlock(), batches()
    specs = {"a": QuantSpec(2, 8), "c": QuantSpec(4, -1)}
    first = learn(block, inputs, specs, steps=12)
    assert set(first.weights) == set(first.reports) == {"a", "c"}
    assert same(first, learn(block, inputs, specs, steps=12))
    assert learn(block, inputs, {}).weights == {}
    assert Omniquant(OmniquantConfig()).needs == {Need.INPUTS, Need.TARGETS, Need.GRADIENTS}


def test_experts_without_tokens_keep_the_start() -> None:
    block, inputs = ToyBlock(routes=[0, 1, 1] * 10, experts=3), batches()
    specs = {name: QuantSpec(2, 8) for name in block.weights}
    start, learned = (learn(block, inputs, specs, steps=steps) for steps in (0, 30))
    for name, moved in {"up.0": True, "down.1": True, "up.2": False, "down.2": False}.items():
        assert torch.equal(dequantize(learned.weights[name]), dequantize(start.weights[name])) is not moved


def test_a_loss_that_overflows_keeps_the_start_and_says_so_once() -> None:
    block, inputs = ToyBlock(), [1e30 * x for x in batches()]
    specs = {name: QuantSpec(2, 8) for name in NAMES}
    learned = learn(block, inputs, specs, steps=20)
    assert same(learned, learn(block, inputs, specs, steps=0))
    notes = [report.note for report in learned.reports.values() if report.note]
    assert len(notes) == 1 and "the loss is not finite at the start" in notes[0]


@pytest.mark.parametrize(
    "options",
    [{"steps": -1}, {"rate": 1.5}, {"rate": float("nan")}, {"accumulate": 0}, {"check_every": 0}, {"patience": 0}],
)
def test_options_outside_their_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        OmniquantConfig(**options)

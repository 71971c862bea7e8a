"""PTQ1.61 over a block: the mask, the grid of the salient channels, what is learned, and what it aims at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pico import pico_model, token_batches
from torch import Tensor
from unit.methods.toy_block import ToyBlock, batches, outputs

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import capture
from bitfloor.core.affine import decode, encode
from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, BlockResult, Need
from bitfloor.methods.learning import Objective, learn_block
from bitfloor.methods.options import Ptq161Config
from bitfloor.methods.ptq161 import Ptq161
from bitfloor.modeling.discover import describe
from bitfloor.solvers.block_opt import Schedule
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.two_tier import LearnedScales

NAMES = ("a", "b", "c")
SPEC = QuantSpec(1, -1)
SPECS = dict.fromkeys(NAMES, SPEC)


def learn(
    block: ToyBlock, inputs: list[Tensor], specs: Mapping[str, QuantSpec] = SPECS, seed: int = 0, **options: Any
) -> BlockResult:
    """PTQ1.61 with the float model's inputs equal to the quantized model's."""
    method = Ptq161(Ptq161Config(**{"steps": 0, "multiple": 1, "rate": 0.005, **options}), seed)
    return method.quantize_block(block, inputs, specs, inputs, outputs(block, inputs))


def salient(weight: PackedWeight) -> list[int]:
    """The channels of the first of two segments."""
    assert weight.order is not None and len(weight.segments) == 2
    return weight.order[: weight.segments[0].columns].tolist()


def largest(score: Tensor, count: int) -> list[int]:
    return score.topk(count).indices.sort().values.tolist()


def block_error(block: ToyBlock, result: BlockResult, inputs: Batches, targets: Batches) -> float:
    weights = {name: dequantize(weight) for name, weight in result.weights.items()}
    pairs = zip(inputs, targets, strict=True)
    return sum(float((block.forward(x, 0, weights) - aim)[:, :-1].square().sum()) for x, aim in pairs)


def same(one: BlockResult, other: BlockResult) -> bool:
    return list(one.weights) == list(other.weights) and all(
        torch.equal(dequantize(one.weights[name]), dequantize(other.weights[name])) for name in one.weights
    )


def test_matrices_fed_by_one_tensor_share_the_mask() -> None:
    block, inputs = ToyBlock(), batches()
    for score in ("max", "mean", "gain", "random"):
        result = learn(block, inputs, score=score)
        assert salient(result.weights["a"]) == salient(result.weights["b"])
        assert len(salient(result.weights["a"])) == 4 and len(salient(result.weights["c"])) == 8
        for weight in result.weights.values():
            assert weight.order is not None and weight.order_unit == 1
            first, second = weight.order.split([part.columns for part in weight.segments])
            assert first.tolist() == sorted(first.tolist()) and second.tolist() == sorted(second.tolist())
            assert sorted(weight.order.tolist()) == list(range(weight.shape[1]))
            assert [(part.bits, part.groups) for part in weight.segments] == [(4, 1), (1, 1)]
        assert all(report.note is None for report in result.reports.values())


def test_channels_are_salient_by_their_score() -> None:
    block, inputs = ToyBlock(), batches()
    quiet = int(torch.cat(inputs).abs().mean((0, 1)).argmin())
    inputs[1][0, 3, quiet] = 100.0  # largest, and not on the mean
    x = torch.cat([batch.reshape(-1, 24) for batch in inputs])
    found = {score: salient(learn(block, inputs, score=score).weights["a"]) for score in ("max", "mean", "gain")}
    assert found["max"] == largest(x.abs().amax(0), 4)
    assert found["mean"] == largest(x.abs().mean(0), 4)
    assert quiet in found["max"] and quiet not in found["mean"]
    error = torch.zeros(24)
    for name in ("a", "b"):
        weight = block.weight(name)
        mean, spread = weight.mean(1, keepdim=True), weight.abs().mean(1, keepdim=True)
        error += (weight - mean - torch.where(weight >= mean, spread, -spread)).square().sum(0)
    assert found["gain"] == largest(x.square().mean(0) * error, 4)
    # Of what enters ``c``, what ``a`` makes of the float model's inputs.
    hidden = (x @ block.weight("a").T).relu()
    assert salient(learn(block, inputs).weights["c"]) == largest(hidden.amax(0), 8)


def test_a_random_mask_goes_by_the_seed() -> None:
    block, inputs = ToyBlock(), batches()
    masks = [salient(learn(block, inputs, seed=seed, score="random").weights["c"]) for seed in (0, 0, 1)]
    assert masks[0] == masks[1] != masks[2]
    one = [salient(learn(block, inputs, seed=seed, score="max").weights["c"]) for seed in (0, 1)]
    assert one[0] == one[1]


def test_the_mask_is_of_the_float_models_inputs() -> None:
    block, exact = ToyBlock(), batches()
    other = batches(seed=9)
    method = Ptq161(Ptq161Config(steps=0, multiple=1))
    found = method.quantize_block(block, other, SPECS, exact, outputs(block, exact))
    assert salient(found.weights["a"]) == salient(learn(block, exact).weights["a"])
    assert salient(found.weights["a"]) != salient(learn(block, other).weights["a"])
    assert method.needs == {Need.INPUTS, Need.EXACT, Need.TARGETS}
    assert Ptq161(Ptq161Config()).needs == method.needs | {Need.GRADIENTS}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid_of_salient_channels_is_that_of_its_range(bits: int) -> None:
    block, inputs = ToyBlock(), batches()
    made = {kind: learn(block, inputs, range=kind, salient_bits=bits) for kind in ("row", "salient", "search")}
    at = salient(made["row"].weights["b"])
    weight = block.weight("b")
    part = weight[:, at].contiguous()
    spec = QuantSpec(bits, -1)
    grid = minmax_grid(part, spec)
    found = {kind: dequantize(result.weights["b"])[:, at] for kind, result in made.items()}
    assert torch.equal(found["salient"], decode(encode(part, grid), grid))
    whole = minmax_grid(weight, spec)
    assert torch.equal(found["row"], decode(encode(weight, whole), whole)[:, at])
    errors = {kind: float((values - part).square().sum()) for kind, values in found.items()}
    assert errors["search"] < errors["salient"] < errors["row"]
    # The rest is the same.
    rest = [j for j in range(24) if j not in at]
    assert len({dequantize(result.weights["b"])[:, rest].sum().item() for result in made.values()}) == 1


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_steps_come_nearer_than_the_start(kind: str) -> None:
    block, inputs = ToyBlock(), batches()
    specs = dict.fromkeys(NAMES, QuantSpec(1, -1, scale_dtype=kind))
    start, learned = (learn(block, inputs, specs, steps=steps, check_every=20) for steps in (0, 100))
    aims = outputs(block, inputs)
    assert block_error(block, learned, inputs, aims) < 0.8 * block_error(block, start, inputs, aims)
    assert start.learning is not None and learned.learning is not None
    assert start.learning.after == start.learning.before == learned.learning.before > learned.learning.after
    assert learned.learning.step > 0 and start.learning.steps == 0
    assert set(learned.reports) == set(NAMES) and all(r.note is None for r in learned.reports.values())
    assert all(part.scale.dtype is getattr(torch, kind) for w in learned.weights.values() for part in w.segments)
    # Signs and codes stay; so do salient channels.
    for name in NAMES:
        one, other = start.weights[name], learned.weights[name]
        for first, second in zip(one.segments, other.segments, strict=True):
            assert torch.equal(first.codes, second.codes)
        at = salient(one)
        assert torch.equal(dequantize(one)[:, at], dequantize(other)[:, at])
        assert not torch.equal(dequantize(one), dequantize(other))


def test_no_steps_keep_the_start() -> None:
    block, inputs = ToyBlock(), batches()
    result = learn(block, inputs)
    for name in NAMES:
        weight, at = block.weight(name), torch.tensor(salient(result.weights[name]))
        others = torch.tensor([j for j in range(weight.shape[1]) if j not in at])
        grid = minmax_grid(weight[:, at].contiguous(), QuantSpec(4, -1))
        codes = encode(weight[:, at].contiguous(), grid)
        alone = LearnedScales(weight, at, others, codes, grid, torch.float16).fake_quantized()
        assert torch.equal(dequantize(result.weights[name])[:, others], alone[:, others])


def test_it_aims_at_the_float_models_output_and_at_the_float_blocks_on_the_same_input() -> None:
    block, exact = ToyBlock(), batches()
    drifted = [0.8 * x for x in exact]
    first, second = outputs(block, exact), outputs(block, drifted)
    results = {
        both: Ptq161(
            Ptq161Config(steps=200, both=both, cosine=False, rate=0.005, multiple=1, check_every=20)
        ).quantize_block(block, drifted, SPECS, exact, first)
        for both in (False, True)
    }
    errors = {
        both: [block_error(block, found, drifted, aim) for aim in (first, second)] for both, found in results.items()
    }
    assert errors[True][0] > errors[False][0] and errors[True][1] < errors[False][1]
    count = sum(x[:, :-1].numel() for x in drifted)
    for both, found in results.items():
        assert found.learning is not None
        assert found.learning.after == pytest.approx(sum(errors[both][: 1 + both]) / count, rel=1e-4)


def test_the_cosine_term_is_the_negative_logarithm_of_the_mean_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    near = torch.stack(
        [output[b, t] @ target[b, t] / output[b, t].norm() / target[b, t].norm() for b in range(2) for t in range(4)]
    )
    plain = (output - target)[:, :-1].square().mean()
    assert float(Objective().of(output, target)) == pytest.approx(float(plain), rel=1e-6)
    expected = float(plain - near.mean().abs().log())
    assert float(Objective(cosine=True).of(output, target)) == pytest.approx(expected, rel=1e-5)
    # A state of zeros is near to nothing, and says so in numbers.
    blank = torch.zeros(2, 5, 6, requires_grad=True)
    value = Objective(cosine=True).of(blank, target)
    value.backward()
    assert bool(torch.isfinite(value)) and blank.grad is not None and bool(torch.isfinite(blank.grad).all())


@pytest.mark.parametrize("cosine", [False, True])
def test_both_targets_add_up(cosine: bool) -> None:
    block, inputs = ToyBlock(), batches()
    drifted = [0.9 * x for x in inputs]
    far, near = outputs(block, inputs), outputs(block, drifted)

    def before(both: bool, targets: list[Tensor]) -> float:
        learnt = {
            n: LearnedScales(w, torch.arange(0), torch.arange(w.shape[1]), None, None, torch.float16)
            for n, w in block.weights.items()
        }
        return learn_block(block, drifted, targets, learnt, Schedule(steps=0), Objective(0.0, both, cosine)).before

    assert before(True, far) == pytest.approx(before(False, far) + before(False, near), rel=1e-5)


def test_what_is_learned_depends_on_the_objective() -> None:
    block, inputs = ToyBlock(), batches()
    drifted = [0.8 * x for x in inputs]
    results = [
        Ptq161(Ptq161Config(steps=10, check_every=1, multiple=1, both=both, cosine=cosine)).quantize_block(
            block, drifted, SPECS, inputs, outputs(block, inputs)
        )
        for both in (False, True)
        for cosine in (False, True)
    ]
    assert not any(same(one, other) for i, one in enumerate(results) for other in results[:i])


def test_only_what_is_wanted_is_learned_and_twice_the_same() -> None:
    """One matrix of a group that is kept: its twin has the same mask, by what enters them."""
    block, inputs = ToyBlock(), batches()
    specs = {"b": SPEC, "c": SPEC}
    first = learn(block, inputs, specs, steps=12)
    assert list(first.weights) == list(first.reports) == ["b", "c"]
    assert same(first, learn(block, inputs, specs, steps=12))
    assert not same(first, learn(block, inputs, specs, seed=1, steps=12))  # batches in another order
    assert salient(first.weights["b"]) == salient(learn(block, inputs).weights["b"])
    empty = learn(block, inputs, {})
    assert empty.weights == {} and empty.learning is None


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_channels_may_have_one_width(ratio: float) -> None:
    block, inputs = ToyBlock(), batches()
    result = learn(block, inputs, ratio=ratio, steps=10, check_every=1)
    for name, weight in result.weights.items():
        (part,) = weight.segments
        assert (part.bits, part.columns, weight.order) == (4 if ratio else 1, block.weight(name).shape[1], None)
        assert (part.channel_scale is None) == bool(ratio) == (part.offset is None)
        if ratio:
            grid = minmax_grid(block.weight(name), QuantSpec(4, -1))
            assert torch.equal(dequantize(weight), decode(encode(block.weight(name), grid), grid))
    assert result.learning is not None and result.learning.steps == (0 if ratio else 10)


def test_tiers_are_what_is_stored() -> None:
    block, inputs = ToyBlock(), batches()
    for options in (
        {},
        {"ratio": 0.5, "multiple": 5, "salient_bits": 3},
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"ratio": 0.01},
    ):
        tiers = Ptq161(Ptq161Config(**{"multiple": 1, **options})).tiers
        for name, weight in learn(block, inputs, **options).weights.items():
            found = [(part.columns, part.bits) for part in weight.segments]
            assert found == tiers(block.weight(name).shape[1])
    assert Ptq161(Ptq161Config()).tiers(4096) == [(800, 4), (3296, 1)]


def test_experts_without_tokens_keep_the_start_and_go_by_their_weights() -> None:
    block, inputs = ToyBlock(routes=[0, 1, 1] * 10, experts=3), batches()
    specs = dict.fromkeys(block.weights, SPEC)
    start, learned = (learn(block, inputs, specs, steps=steps, check_every=5) for steps in (0, 30))
    for name, moved in {"up.0": True, "down.1": True, "up.2": False, "down.2": False}.items():
        assert torch.equal(dequantize(learned.weights[name]), dequantize(start.weights[name])) is not moved
        note = learned.reports[name].note
        assert (note is None) is moved and (moved or "saw no calibration token" in str(note))
    weight = block.weight("up.2")
    assert salient(start.weights["up.2"]) == largest(weight.square().sum(0), 4)
    alike = learn(block, inputs, specs, score="random")
    assert all(report.note is None for report in alike.reports.values())


@pytest.mark.parametrize("score", ["max", "mean", "gain"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(bad: float, score: str) -> None:
    block, inputs = ToyBlock(), batches()
    inputs[1][0, 0, 3] = bad
    with pytest.raises(BitfloorError, match="activations that enter a are not finite"):
        learn(block, inputs, score=score)


def test_dead_channels_and_rows_are_no_trouble() -> None:
    """Channels that are always zero, in the inputs or in the weights, and rows of zeros and of one number."""
    block, inputs = ToyBlock(), batches()
    for x in inputs:
        x[..., 2:20] = 0.0
    block.weights["a"][:, 4] = 0.0
    block.weights["a"][3] = 0.0
    block.weights["b"][5] = 0.5
    for score in ("max", "mean", "gain"):
        start, result = (learn(block, inputs, steps=steps, check_every=5, score=score) for steps in (0, 30))
        assert all(bool(torch.isfinite(dequantize(weight)).all()) for weight in result.weights.values())
        assert not bool(dequantize(result.weights["a"])[3].any())
        rest = [j for j in range(24) if j not in salient(start.weights["b"])]
        assert set(dequantize(start.weights["b"])[5, rest].tolist()) == {0.5}
        assert result.learning is not None and result.learning.after < result.learning.before
    for x in inputs:
        x.zero_()
    assert all(bool(torch.isfinite(dequantize(w)).all()) for w in learn(block, inputs, steps=3).weights.values())


def test_a_loss_that_overflows_keeps_the_start_and_says_so_once() -> None:
    block, inputs = ToyBlock(), [1e30 * x for x in batches()]
    learned = learn(block, inputs, steps=20)
    assert same(learned, learn(block, inputs))
    notes = [report.note for report in learned.reports.values() if report.note]
    assert len(notes) == 1 and "the loss is not finite at the start" in notes[0]


class OneByOne(BlockRunner):
    """A block that does not know of its stacks."""

    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        return {}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])  # the last one stores [E, I, O]
def test_a_stack_learns_what_its_experts_learn_one_by_one(name: str) -> None:
    model = pico_model(name).requires_grad_(False)
    parts = describe(model)
    seen = capture(model, parts.blocks_path, token_batches(3))
    path = parts.block_path(0)
    results = []
    for kind in (BlockRunner, OneByOne):
        runner = kind(model.get_submodule(path), path, parts.block_matrices(0), seen.calls[0])
        with torch.no_grad():
            targets = [runner.forward(x, i) for i, x in enumerate(seen.hidden)]
            drifted = [0.7 * x for x in seen.hidden]
            method = Ptq161(Ptq161Config(steps=8, rate=0.005, check_every=2))
            specs = dict.fromkeys(runner.names, SPEC)
            results.append(method.quantize_block(runner, drifted, specs, seen.hidden, targets))
    assert same(*results)
    assert results[0].learning == results[1].learning
    assert results[0].learning is not None and results[0].learning.step > 0
    experts = [name for name in results[0].weights if "experts." in name]
    assert len({tuple(salient(results[0].weights[name])) for name in experts if "gate_up" in name}) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": -0.1},
        {"ratio": 1.5},
        {"ratio": float("nan")},
        {"multiple": 0},
        {"salient_bits": 1},
        {"salient_bits": 7},
        {"steps": -1},
        {"rate": float("nan")},
        {"check_every": 0},
        {"patience": 0},
    ],
)
def test_options_outside_their_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Ptq161Config(**options)

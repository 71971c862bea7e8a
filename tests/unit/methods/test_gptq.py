"""GPTQ over a block: what each matrix sees, and what happens when it sees too little."""

from __future__ import annotations

import pytest
import torch
from unit.methods.toy_block import ToyBlock, batches

from bitfloor.calib.stats import HessianSum
from bitfloor.core.affine import Grid, decode, encode, pack
from bitfloor.core.errors import InputError
from bitfloor.core.metrics import output_error
from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.methods.base import Need
from bitfloor.methods.gptq import MIN_TOKENS_PER_CHANNEL, Gptq, Shown, drifted_error, split_grid
from bitfloor.methods.options import GptqConfig, RtnConfig
from bitfloor.methods.rtn import Rtn
from bitfloor.solvers.gptq import GridSearch, gptq
from bitfloor.solvers.ranges import minmax_grid, search_grid, tempered

NAMES = ("a", "b", "c")
CONFIGS = [
    GptqConfig(),
    GptqConfig("search", 1.0, static_groups=True, damping=0.01),
    GptqConfig("minmax", damping=0.1, act_order=False),
]


def solved_alone(weight: torch.Tensor, seen: torch.Tensor, spec: QuantSpec, config: GptqConfig) -> PackedWeight:
    """GPTQ of one matrix on the inputs ``[N, I]`` it is meant to have seen."""
    total = HessianSum(weight.shape[1])
    total.add(seen)
    importance = total.total.diagonal().pow(config.importance)

    def find(_: int, part: torch.Tensor, at: torch.Tensor) -> Grid:
        return search_grid(part, importance[at], spec) if config.range == "search" else minmax_grid(part, spec)

    every = torch.arange(weight.shape[1])
    whole = config.static_groups or spec.columns_per_group(len(every)) == len(every)
    grids = find(0, weight, every) if whole else GridSearch(spec.group_size, find)
    solved = gptq(weight, total.total, grids, damping=config.damping, act_order=config.act_order)
    return pack(solved.codes, solved.grid)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("range_", ["search", "minmax"])
def test_every_spec_gives_weights_with_less_output_error_than_rounding(bits: int, symmetric: bool, range_: str) -> None:
    block, inputs = ToyBlock(), batches()
    specs = {name: QuantSpec(bits, 16, symmetric) for name in NAMES}
    result = Gptq(GptqConfig(range_)).quantize_block(block, inputs, specs)
    rounded = Rtn(RtnConfig(range_)).quantize_block(block, inputs, specs)
    assert set(result.weights) == set(result.reports) == set(NAMES)
    assert all(report.note is None for report in result.reports.values())
    flat = torch.cat([x.reshape(-1, 24) for x in inputs])
    for name in ("a", "b"):
        weight = block.weight(name)
        ours, theirs = (output_error(weight, dequantize(r.weights[name]), flat.T @ flat) for r in (result, rounded))
        assert ours < theirs
        # The report sums the Hessian batch by batch: another order of float32 additions.
        assert result.reports[name].output_error == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_matrix_sees_the_quantized_ones_before_it(config: GptqConfig) -> None:
    block, spec = ToyBlock(), QuantSpec(2, 8)
    (x,) = batches(1)
    method = Gptq(config)
    assert method.needs == {Need.INPUTS, Need.HESSIAN}
    result = method.quantize_block(block, [x], dict.fromkeys(NAMES, spec))
    assert block.passes == 2  # (a, b), then c
    quantized, float_ = dequantize(result.weights["a"]), block.weight("a")
    # One batch, so that the Hessian is the same product bit for bit.
    seen, unseen = ((x.reshape(-1, 24) @ weight.T).relu() for weight in (quantized, float_))
    got = dequantize(result.weights["c"])
    assert torch.equal(got, dequantize(solved_alone(block.weight("c"), seen, spec, config)))
    assert not torch.equal(got, dequantize(solved_alone(block.weight("c"), unseen, spec, config)))


def test_matrices_of_one_input_are_swept_together_and_equal_those_swept_alone() -> None:
    block, spec = ToyBlock(), QuantSpec(3, 8)
    (x,) = batches(1)
    result = Gptq(GptqConfig()).quantize_block(block, [x], dict.fromkeys(NAMES, spec))
    for name in ("a", "b"):
        alone = solved_alone(block.weight(name), x.reshape(-1, 24), spec, GptqConfig())
        assert torch.equal(dequantize(result.weights[name]), dequantize(alone))


def test_matrices_of_one_input_may_have_different_specs() -> None:
    block, (x,) = ToyBlock(), batches(1)
    specs = {"a": QuantSpec(2, 8), "b": QuantSpec(4, -1, symmetric=True, scale_dtype="bfloat16")}
    result = Gptq(GptqConfig()).quantize_block(block, [x], specs)
    for name, spec in specs.items():
        segment = result.weights[name].segments[0]
        assert segment.bits == spec.bits
        assert segment.scale.dtype == getattr(torch, spec.scale_dtype)
        alone = solved_alone(block.weight(name), x.reshape(-1, 24), spec, GptqConfig())
        assert torch.equal(dequantize(result.weights[name]), dequantize(alone))


def test_a_matrix_that_is_kept_stays_float_for_those_after_it() -> None:
    block, (x,), spec = ToyBlock(), batches(1), QuantSpec(2, 8)
    result = Gptq(GptqConfig()).quantize_block(block, [x], {"c": spec})
    assert set(result.weights) == {"c"}
    seen = (x.reshape(-1, 24) @ block.weight("a").T).relu()
    assert torch.equal(
        dequantize(result.weights["c"]), dequantize(solved_alone(block.weight("c"), seen, spec, GptqConfig()))
    )


def test_experts_with_too_few_tokens_are_rounded_and_named() -> None:
    # One batch of 60 tokens: 52 for expert 0, 8 for expert 1, none for expert 2. `up` has 24 channels and needs 6
    # tokens, `down` has 40 and needs 10: expert 1 is starved in its second matrix only.
    block = ToyBlock(routes=[0] * 26 + [1] * 4, experts=3)
    assert MIN_TOKENS_PER_CHANNEL == 0.25
    names = [f"{part}.{e}" for e in range(3) for part in ("up", "down")]
    spec = QuantSpec(3, 8)
    result = Gptq(GptqConfig()).quantize_block(block, batches(1), dict.fromkeys(names, spec))
    assert set(result.weights) == set(names)
    notes = {name: report.note for name, report in result.reports.items()}
    assert notes["up.0"] is notes["down.0"] is notes["up.1"] is None
    assert notes["down.1"] == "saw 8 calibration tokens for 40 input channels; rounded to nearest instead"
    assert notes["up.2"] == "saw 0 calibration tokens for 24 input channels; rounded to nearest instead"
    assert result.reports["up.2"].output_error is None
    assert result.reports["down.1"].output_error is not None
    for name in ("down.1", "up.2", "down.2"):
        weight = block.weight(name)
        grid = search_grid(weight, torch.ones(weight.shape[1]), spec)
        assert torch.equal(dequantize(result.weights[name]), dequantize(pack(encode(weight, grid), grid)))


def test_experts_are_observed_stage_by_stage_not_one_by_one() -> None:
    block = ToyBlock(routes=[0, 1, 2, 3, 4] * 6, experts=5)
    names = [f"{part}.{e}" for e in range(5) for part in ("up", "down")]
    Gptq(GptqConfig()).quantize_block(block, batches(), dict.fromkeys(names, QuantSpec(3, 8)))
    assert block.passes == 2


def test_raised_damping_is_reported() -> None:
    block = ToyBlock()
    few = batches(1, sequences=1, tokens=10)  # ten tokens for 24 channels: enough to try, too few for full rank
    result = Gptq(GptqConfig(damping=0.0)).quantize_block(block, few, {"a": QuantSpec(3, 8)})
    assert result.reports["a"].note == "damping raised from 0 to 0.0001 to factorise the Hessian"
    assert Gptq(GptqConfig()).quantize_block(block, few, {"a": QuantSpec(3, 8)}).reports["a"].note is None


def test_a_stacked_grid_splits_into_the_grids_of_its_rows() -> None:
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    for spec in (QuantSpec(3, 8), QuantSpec(3, 8, symmetric=True), QuantSpec(1, 8)):
        parts = split_grid(minmax_grid(weight, spec), [3, 1, 6])
        for rows, part in zip(torch.split(weight, [3, 1, 6]), parts, strict=True):
            alone = minmax_grid(rows, spec)
            assert torch.equal(part.scale, alone.scale)
            assert torch.equal(part.shift, alone.shift)
            assert (part.zero is None, part.constant_zero) == (alone.zero is None, alone.constant_zero)


def test_the_block_is_not_changed() -> None:
    block = ToyBlock()
    before = {name: weight.clone() for name, weight in block.weights.items()}
    Gptq(GptqConfig()).quantize_block(block, batches(), dict.fromkeys(NAMES, QuantSpec(2, 8)))
    assert all(torch.equal(block.weights[name], before[name]) for name in before)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="importance = 1.5 is not an exponent between 0"):
        GptqConfig(importance=1.5)
    with pytest.raises(InputError, match="damping = -1 is not a share"):
        GptqConfig(damping=-1)


def test_a_loud_channel_does_not_own_the_grid_of_its_group() -> None:
    # One of eight channels is a thousand times larger. In full weight its column decides the grid and the other seven
    # are rounded as badly as it likes; tempered, they have a say.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 8, generator=generator)
    importance = torch.tensor([1e6, 1, 1, 1, 1, 1, 1, 1])
    errors = []
    for exponent in (1.0, 0.5, 0.0):
        grid = search_grid(weight, tempered(importance, exponent), QuantSpec(2, 8))
        rounded = (decode(encode(weight, grid), grid) - weight).square()
        errors.append((float(rounded[:, 0].sum()), float(rounded[:, 1:].sum())))
    loud, quiet = zip(*errors, strict=True)
    assert loud[0] < loud[1] < loud[2]
    assert quiet[0] > 1.05 * quiet[1] > 1.05 * quiet[2]


def test_correction_aims_at_the_float_models_output() -> None:
    block, spec = ToyBlock(), QuantSpec(2, 8)
    exact = batches()
    moved = [x + 0.2 * x.flip(-1) for x in exact]
    target = torch.cat([block.forward(x, 0) for x in exact])
    errors = []
    for share in (0.0, 1.0):
        method = Gptq(GptqConfig(correction=share))
        assert (Need.EXACT in method.needs) is (share > 0)
        result = method.quantize_block(block, moved, dict.fromkeys(NAMES, spec), exact)
        weights = {name: dequantize(weight) for name, weight in result.weights.items()}
        errors.append(float((torch.cat([block.forward(x, 0, weights) for x in moved]) - target).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_correction_of_inputs_that_did_not_drift_is_none() -> None:
    block, spec, inputs = ToyBlock(), QuantSpec(2, 8), batches()
    names = {"a": spec, "b": spec}
    plain = Gptq(GptqConfig()).quantize_block(block, inputs, names)
    corrected = Gptq(GptqConfig(correction=0.5)).quantize_block(block, inputs, names, inputs)
    assert all(torch.equal(dequantize(plain.weights[n]), dequantize(corrected.weights[n])) for n in names)


def test_the_error_on_held_out_text_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.randn(2, 7, 12, generator=generator)
    exact, x = torch.randn(2, 50, 12, generator=generator)
    shown = Shown(x.T @ x, (exact - x).T @ x, 50)

    def plain(found: torch.Tensor) -> float:
        return float((x @ found.T - exact @ weight.T).square().sum())

    constant = plain(weight)
    assert drifted_error(weight, other, shown) == pytest.approx(plain(other) - constant, rel=1e-4)
    assert drifted_error(weight, weight, shown) == 0.0


def test_the_correction_that_is_best_on_held_out_text_is_chosen_and_solved_with_all_text() -> None:
    block, inputs = ToyBlock(), batches(8)
    specs = dict.fromkeys(NAMES, QuantSpec(3, 8))
    # Drift that a linear map undoes: the more is corrected the better.
    drifted = [x * torch.linspace(0.7, 1.2, 24) for x in inputs]
    result = Gptq(GptqConfig(choose=True)).quantize_block(block, drifted, specs, inputs)
    assert result.reports["a"].chosen == {"correction": 1.0} and result.reports["a"].note is None
    full = Gptq(GptqConfig(correction=1.0)).quantize_block(block, drifted, specs, inputs)
    for name in ("a", "b"):
        torch.testing.assert_close(dequantize(result.weights[name]), dequantize(full.weights[name]))
    # No drift: nothing to correct, all shares are equal, and the first is taken.
    still = Gptq(GptqConfig(choose=True)).quantize_block(block, inputs, specs, inputs)
    assert still.reports["a"].chosen == {"correction": 0.0}
    # Matrices of one input that are stored differently choose each for itself, and all get all of the text.
    mixed = {"a": QuantSpec(3, 8), "b": QuantSpec(4, 8), "c": QuantSpec(3, 8)}
    own = Gptq(GptqConfig(choose=True)).quantize_block(block, drifted, mixed, inputs)
    assert own.reports["b"].chosen == {"correction": 1.0}
    other = Gptq(GptqConfig(correction=1.0)).quantize_block(block, drifted, mixed, inputs)
    torch.testing.assert_close(dequantize(own.weights["b"]), dequantize(other.weights["b"]))


def test_too_little_text_to_hold_some_out_keeps_the_given_correction() -> None:
    inputs = batches(2)
    specs = dict.fromkeys(NAMES, QuantSpec(3, 8))
    chosen = Gptq(GptqConfig(correction=0.5, choose=True)).quantize_block(ToyBlock(), inputs, specs, inputs)
    given = Gptq(GptqConfig(correction=0.5)).quantize_block(ToyBlock(), inputs, specs, inputs)
    for name in NAMES:
        assert "too little text to choose the correction; 0.5 was kept" in str(chosen.reports[name].note)
        assert not chosen.reports[name].chosen
        assert torch.equal(dequantize(chosen.weights[name]), dequantize(given.weights[name]))


def test_without_order_a_block_is_observed_once_on_its_float_matrices() -> None:
    inputs = batches()
    specs = dict.fromkeys(NAMES, QuantSpec(3, 8))
    block, other = ToyBlock(), ToyBlock()
    together = Gptq(GptqConfig(sequential=False)).quantize_block(block, inputs, specs)
    in_order = Gptq(GptqConfig()).quantize_block(other, inputs, specs)
    assert (block.passes, other.passes) == (1, 2)
    assert Need.TOGETHER in Gptq(GptqConfig(sequential=False)).needs
    for name in ("a", "b"):  # fed by the block's input either way
        assert torch.equal(dequantize(together.weights[name]), dequantize(in_order.weights[name]))
    assert not torch.equal(dequantize(together.weights["c"]), dequantize(in_order.weights["c"]))
    flat = torch.cat([x.reshape(-1, 24) for x in inputs])
    alone = solved_alone(block.weight("c"), (flat @ block.weight("a").T).relu(), specs["c"], GptqConfig())
    torch.testing.assert_close(dequantize(together.weights["c"]), dequantize(alone))


def test_too_few_tokens_to_choose_from_do_not_choose() -> None:
    inputs = batches(6, sequences=1, tokens=1)  # five to solve with, six are needed
    specs = {"a": QuantSpec(3, 8)}
    chosen = Gptq(GptqConfig(correction=0.5, choose=True)).quantize_block(ToyBlock(), inputs, specs, inputs)
    given = Gptq(GptqConfig(correction=0.5)).quantize_block(ToyBlock(), inputs, specs, inputs)
    assert "0.5 was kept" in str(chosen.reports["a"].note)
    assert torch.equal(dequantize(chosen.weights["a"]), dequantize(given.weights["a"]))

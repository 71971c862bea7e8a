"""Round-to-nearest over a block."""

from __future__ import annotations

import pytest
import torch
from unit.methods.toy_block import ToyBlock, batches

from bitfloor.core.affine import encode, pack
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.methods.base import Need
from bitfloor.methods.options import RtnConfig
from bitfloor.methods.rtn import Rtn
from bitfloor.solvers.ranges import minmax_grid, search_grid

NAMES = ("a", "b", "c")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("range_", ["search", "minmax"])
def test_every_spec_gives_weights_of_the_right_shape(bits: int, symmetric: bool, range_: str) -> None:
    block = ToyBlock()
    specs = {name: QuantSpec(bits, 16, symmetric) for name in NAMES}
    result = Rtn(RtnConfig(range_)).quantize_block(block, batches(), specs)
    assert set(result.weights) == set(result.reports) == set(NAMES)
    for name in NAMES:
        weight = dequantize(result.weights[name])
        assert weight.shape == block.weight(name).shape
        # Better than zeros even at one bit, whose levels leave 1 - 2 / pi = 0.36 of a normal weight's energy.
        assert float((weight - block.weight(name)).square().sum()) < 0.6 * float(block.weight(name).square().sum())
        assert result.reports[name].note is None


def test_minmax_needs_nothing_and_runs_nothing() -> None:
    block, method = ToyBlock(), Rtn(RtnConfig("minmax"))
    assert method.needs == frozenset()
    result = method.quantize_block(block, [], {"a": QuantSpec(4, 8)})
    assert block.passes == 0
    grid = minmax_grid(block.weight("a"), QuantSpec(4, 8))
    assert torch.equal(dequantize(result.weights["a"]), dequantize(pack(encode(block.weight("a"), grid), grid)))
    assert result.reports["a"].output_error is None


def test_search_weights_every_matrix_by_its_own_float_inputs_in_one_pass() -> None:
    block, inputs, spec = ToyBlock(), batches(), QuantSpec(2, 8)
    method = Rtn(RtnConfig())
    assert method.needs == {Need.INPUTS}
    result = method.quantize_block(block, inputs, dict.fromkeys(NAMES, spec))
    assert block.passes == 1
    flat = torch.cat([x.reshape(-1, 24) for x in inputs])
    hidden = (flat @ block.weight("a").T).relu()
    for name, seen in (("a", flat), ("b", flat), ("c", hidden)):
        # The grid search compares errors, and means in float64 differ in the last bit: compare what matters, the error.
        importance = seen.double().square().mean(0)
        expected = search_grid(block.weight(name), importance.float(), spec)
        wanted = dequantize(pack(encode(block.weight(name), expected), expected)).double()
        got = dequantize(result.weights[name]).double()
        errors = [float(((w - block.weight(name)).square() * importance).sum()) for w in (got, wanted)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)
        energy = float((block.weight(name).square() * importance).sum())
        error = result.reports[name].output_error
        assert error == pytest.approx(errors[0] / energy, rel=1e-4)  # float32 terms, float64 sum


def test_only_the_matrices_asked_for_are_quantized() -> None:
    result = Rtn(RtnConfig()).quantize_block(ToyBlock(), batches(), {"b": QuantSpec(3, 8)})
    assert set(result.weights) == {"b"}


def test_an_expert_without_tokens_is_named_and_still_quantized() -> None:
    block = ToyBlock(routes=[0] * 20 + [1] * 10, experts=3)
    names = [f"{part}.{e}" for e in range(3) for part in ("up", "down")]
    result = Rtn(RtnConfig()).quantize_block(block, batches(), dict.fromkeys(names, QuantSpec(3, 8)))
    assert set(result.weights) == set(names)
    for name in names:
        note = result.reports[name].note
        assert (note is not None and "no calibration token" in note) == name.endswith(".2")
    grid = search_grid(block.weight("up.2"), torch.ones(24), QuantSpec(3, 8))
    assert torch.equal(dequantize(result.weights["up.2"]), dequantize(pack(encode(block.weight("up.2"), grid), grid)))


def test_the_block_is_not_changed() -> None:
    block = ToyBlock()
    before = {name: weight.clone() for name, weight in block.weights.items()}
    Rtn(RtnConfig()).quantize_block(block, batches(), dict.fromkeys(NAMES, QuantSpec(2, 8)))
    assert all(torch.equal(block.weights[name], before[name]) for name in before)

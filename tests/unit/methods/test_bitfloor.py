"""bitfloor's own method: it starts at GPTQ, bit for bit, and ends nearer to the float block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.methods.test_signround import block_error, same
from unit.methods.toy_block import ToyBlock, batches, outputs

from bitfloor.core.affine import pack
from bitfloor.core.errors import InputError
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import BlockResult, Need
from bitfloor.methods.bitfloor import Bitfloor, codes_and_grids
from bitfloor.methods.gptq import Gptq
from bitfloor.methods.options import BitfloorConfig, GptqConfig

NAMES = ("a", "b", "c")
INPUTS = batches(6, tokens=40)
DRIFTED = [0.9 * x for x in INPUTS]


def run(specs: dict[str, QuantSpec], block: ToyBlock | None = None, **options: Any) -> BlockResult:
    block = block or ToyBlock()
    method = Bitfloor(BitfloorConfig(**options))
    return method.quantize_block(block, DRIFTED, specs, INPUTS, outputs(block, INPUTS))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_without_steps_it_is_gptq_and_steps_come_nearer(bits: int, symmetric: bool) -> None:
    specs = {name: QuantSpec(bits, 8, symmetric) for name in NAMES}
    start = Gptq(GptqConfig(correction=0.5, sweeps=2)).quantize_block(ToyBlock(), DRIFTED, specs, INPUTS)
    assert same(run(specs, steps=0), start)
    learned = run(specs, rate=5e-3 if bits < 8 else 1e-5)
    errors = [block_error(ToyBlock(), result, DRIFTED, INPUTS) for result in (learned, start)]
    # At 8 bits hardly a code moves in steps that leave its scale alone.
    assert errors[0] < errors[1] or (bits == 8 and errors[0] == errors[1])
    assert all(learned.weights[name].segments[0].bits == bits for name in NAMES)


@pytest.mark.parametrize("spec", [QuantSpec(2, 8), QuantSpec(3, 7, True), QuantSpec(4, -1, False, "bfloat16")], ids=str)
def test_codes_and_grid_are_those_that_were_packed(spec: QuantSpec) -> None:
    (weight,) = run({"c": spec}, steps=0).weights.values()
    again = pack(*codes_and_grids(weight, spec)[0])
    for one, other in zip(weight.segments, again.segments, strict=True):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
        assert one.scale.dtype == other.scale.dtype and one.group_size == other.group_size
        assert torch.equal(torch.as_tensor(one.zero), torch.as_tensor(other.zero))


def test_needs_follow_the_options() -> None:
    assert Bitfloor(BitfloorConfig()).needs == {Need.INPUTS, Need.EXACT, Need.HESSIAN, Need.TARGETS, Need.GRADIENTS}
    fast = BitfloorConfig(steps=0, correction=0.0)
    assert Bitfloor(fast).needs == {Need.INPUTS, Need.HESSIAN}


def test_experts_keep_the_start_where_no_token_came() -> None:
    block = ToyBlock(routes=[0, 1] * 20, experts=3)
    specs = {name: QuantSpec(2, 8) for name in block.weights}
    learned, start = run(specs, block), run(specs, block, steps=0)
    for name in ("up.2", "down.2"):
        assert same(BlockResult({name: learned.weights[name]}), BlockResult({name: start.weights[name]}))
        assert "calibration tokens" in (learned.reports[name].note or "")
    assert not same(learned, start)


def test_what_the_start_said_of_a_matrix_is_not_said_of_what_was_learned() -> None:
    specs = {name: QuantSpec(2, 8) for name in NAMES}
    assert all(report.output_error is not None for report in run(specs, steps=0).reports.values())
    assert all(report.output_error is None for report in run(specs, steps=2).reports.values())


@pytest.mark.parametrize(
    "options", [{"steps": -1}, {"rate": 2.0}, {"suppress": 1.0}, {"importance": 1.5}, {"damping": -1.0}]
)
def test_options_outside_their_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        BitfloorConfig(**options)

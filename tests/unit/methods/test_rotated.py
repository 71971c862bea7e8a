"""Every method on a rotated storage does what it does to a block whose matrices and inputs were rotated beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.methods.toy_block import ToyBlock, batches

from bitfloor.core.metrics import relative_error
from bitfloor.core.packed import dequantize
from bitfloor.core.rotation import rotate
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.bitfloor import Bitfloor
from bitfloor.methods.gptq import Gptq
from bitfloor.methods.omniquant import Omniquant
from bitfloor.methods.options import BitfloorConfig, GptqConfig, OmniquantConfig, RtnConfig, SignroundConfig
from bitfloor.methods.rtn import Rtn
from bitfloor.methods.signround import Signround

SIZE = 8
METHODS = [
    Rtn(RtnConfig()),
    Rtn(RtnConfig("minmax")),
    Gptq(GptqConfig()),
    Gptq(GptqConfig(correction=0.5, sweeps=2, static_groups=False)),
    Signround(SignroundConfig(steps=0)),
    Signround(SignroundConfig(steps=8, rate=0.02)),
    Bitfloor(BitfloorConfig(steps=8, rate=0.02)),
    Omniquant(OmniquantConfig(steps=8, rate=0.02)),
]


class RotatedBlock(ToyBlock):
    """Computes what its base does, with rotated matrices and rotated inputs of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {name: rotate(weight, SIZE) for name, weight in self.weights.items()}

    def _run(self, x: Any, note: Any, overrides: Any) -> Any:
        back = {name: rotate(overrides.get(name, weight), SIZE) for name, weight in self.weights.items()}
        return super()._run(x, lambda name, rows: note(name, rotate(rows, SIZE)), back)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.config}")
def test_rotated_storage_is_rotated_matrices(method: Any) -> None:
    inputs = batches()
    ours = _quantized(method, ToyBlock(), inputs, QuantSpec(3, 8, rotation=SIZE))
    theirs = _quantized(method, RotatedBlock(), inputs, QuantSpec(3, 8))
    for name in ours.weights:
        assert ours.weights[name].rotation == SIZE and theirs.weights[name].rotation == 0
        one, other = dequantize(ours.weights[name]), rotate(dequantize(theirs.weights[name]), SIZE)
        # A sum in another order can tip a code; hardly one does.
        assert relative_error(other, one) < 2e-3, name
        errors = [result.reports[name].output_error for result in (ours, theirs)]
        assert errors[0] == (None if errors[1] is None else pytest.approx(errors[1], rel=0.05))


def _quantized(method: Any, block: ToyBlock, inputs: list[torch.Tensor], spec: QuantSpec) -> Any:
    targets = [block.forward(x, index) for index, x in enumerate(inputs)]
    return method.quantize_block(block, inputs, dict.fromkeys("abc", spec), inputs, targets)


def test_matrices_of_one_input_may_be_rotated_differently() -> None:
    inputs = batches()
    for method in (Rtn(RtnConfig()), Gptq(GptqConfig())):
        mixed = {"a": QuantSpec(4, 8), "b": QuantSpec(4, 8, rotation=8), "c": QuantSpec(4, 8, rotation=4)}
        block = ToyBlock()
        result = method.quantize_block(block, inputs, mixed)
        for name, spec in mixed.items():
            assert result.weights[name].rotation == spec.rotation
            assert relative_error(block.weight(name), dequantize(result.weights[name])) < 0.05
        alone = method.quantize_block(ToyBlock(), inputs, {"a": mixed["a"]})
        assert torch.equal(dequantize(alone.weights["a"]), dequantize(result.weights["a"]))

"""Scales as parameters: the start is the stored matrix, and the gradient is automatic differentiation's."""

from __future__ import annotations

import pytest
import torch

from bitfloor.core.affine import encode, pack
from bitfloor.core.basis import basis_of
from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.core.rotation import rotate
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.adamw import AdamW
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.scales import TunedScales, tunable


def packed(spec: QuantSpec, columns: int = 20) -> PackedWeight:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    grid = minmax_grid(weight, spec)
    return pack(encode(weight, grid), grid, basis_of(spec))


SPECS = [
    QuantSpec(2, 8),
    QuantSpec(3, 7, True),
    QuantSpec(8, -1),
    QuantSpec(4, 8, False, "bfloat16"),
    QuantSpec(3, 8, rotation=8),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_start_is_the_stored_matrix_and_the_gradient_is_exact(spec: QuantSpec) -> None:
    weight = packed(spec)
    scales = TunedScales(weight)
    torch.testing.assert_close(scales.dense(), dequantize(weight), rtol=1e-6, atol=1e-7)
    assert torch.equal(scales.scale().to(scales.stored), weight.segments[0].scale)
    factor = torch.ones_like(scales.start, requires_grad=True)
    wide = (scales.centred.float() * (scales.start * factor).unsqueeze(-1)).flatten(1)[:, :20]
    wide = rotate(wide, spec.rotation)
    grad = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward(wide, grad)
    assert factor.grad is not None
    torch.testing.assert_close(scales.gradient(grad), factor.grad)
    scales.factor.mul_(1.5)
    torch.testing.assert_close(scales.dense(), 1.5 * dequantize(weight), rtol=1e-2, atol=1e-3)
    assert torch.equal(scales.scale().to(scales.stored).float(), scales.scale())


def test_one_bit_matrices_keep_their_scales() -> None:
    weight = packed(QuantSpec(1, 8))
    assert not tunable(weight)
    with pytest.raises(ValueError, match="one segment"):
        TunedScales(weight)


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(5, 3, generator=generator)
    theirs = ours.clone().requires_grad_()
    mine = AdamW(decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for t in range(1, 12):
        grad = torch.randn(5, 3, generator=generator)
        rate = 0.1 / t
        mine.step("p", ours, grad, rate, t)
        other.param_groups[0]["lr"] = rate
        theirs.grad = grad
        other.step()
        torch.testing.assert_close(ours, theirs.detach())

"""The rotation of input channels: orthonormal, its own inverse, and nothing but signs and a factor."""

from __future__ import annotations

import pytest
import torch

from bitfloor.core import rotation
from bitfloor.core.affine import encode, pack
from bitfloor.core.basis import basis_of
from bitfloor.core.errors import InputError
from bitfloor.core.packed import dequantize
from bitfloor.core.rotation import rotate, rotate_both
from bitfloor.core.spec import QuantSpec, is_rotation
from bitfloor.solvers.ranges import minmax_grid


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 9.0]])
    # A block of four, then two, then one.
    expected = torch.tensor([[5.0, -1.0, -2.0, 0.0, 12 / 2**0.5, -2 / 2**0.5, 9.0]])
    torch.testing.assert_close(rotate(x, 4), expected)
    assert rotate(x, 0) is x


@pytest.mark.parametrize(("columns", "size"), [(64, 64), (576, 64), (40, 64), (100, 8), (1, 2), (3000, 1024), (5, 2)])
def test_it_is_its_own_inverse_and_keeps_lengths(columns: int, size: int) -> None:
    x = torch.randn(3, 2, columns, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, size)
    assert turned.shape == x.shape and (columns < 2 or not torch.equal(turned, x))
    torch.testing.assert_close(rotate(turned, size), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_a_loud_channel_is_spread_over_its_block_only() -> None:
    x = torch.zeros(1, 96)
    x[0, 5] = 64.0
    turned = rotate(x, 32)
    assert float(turned[:, :32].abs().max() - turned[:, :32].abs().min()) < 1e-5
    assert not bool(turned[:, 32:].any())


def test_both_sides_are_what_rotated_inputs_give() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 36, generator=generator), torch.randn(50, 36, generator=generator)
    torch.testing.assert_close(rotate_both(x.T @ y, 16), rotate(x, 16).T @ rotate(y, 16), rtol=1e-4, atol=1e-4)


def test_half_types_and_empty_tensors() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert rotate(x, 16).dtype == torch.bfloat16
    assert torch.equal(rotate(x, 16), rotate(x.float(), 16).bfloat16())
    assert rotate(torch.empty(0, 32), 16).shape == (0, 32)


def test_modes_of_the_first_caller_do_not_matter() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    expected = rotate(x, 32)
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        rotation._hadamard.cache_clear()
        with mode:
            assert torch.equal(rotate(x, 32), expected)
    rotation._hadamard.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(rotate(x, 32), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    rotation._hadamard.cache_clear()
    with torch.inference_mode():
        rotate(x, 32)
    leaf = x.clone().requires_grad_()
    torch.autograd.backward(rotate(leaf, 32).sum())
    assert leaf.grad is not None


def test_a_packed_matrix_is_rotated_back() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec(8, 8, rotation=16)
    turned = rotate(weight, 16)
    grid = minmax_grid(turned, spec)
    packed = pack(encode(turned, grid), grid, basis_of(spec))
    torch.testing.assert_close(dequantize(packed), weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [1, 3, -2, 48, 2048])
def test_other_sizes_are_refused(size: int) -> None:
    assert not is_rotation(size)
    with pytest.raises(InputError, match=f"rotation = {size} .*power of two"):
        QuantSpec(4, 64, rotation=size)

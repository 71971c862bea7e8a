"""An order of the channels and a rotation behind it: what goes in comes back, and products do not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitfloor.core.affine import encode, pack
from bitfloor.core.basis import Basis, basis_of, by_size
from bitfloor.core.channels import is_order, pack_order, unpack_order
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.formats.layout import check_layout
from bitfloor.formats.native import layout, reject
from bitfloor.ops.reference import packed_linear, row_panel
from bitfloor.solvers.ranges import minmax_grid

ORDER = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
CHANNELS = pack_order(ORDER)
BASES = [Basis(), Basis(CHANNELS), Basis(b"", 16), Basis(CHANNELS, 16)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("basis", BASES)
def test_there_and_back(basis: Basis) -> None:
    x = random(3, 5, 40)
    torch.testing.assert_close(basis.back(basis.to(x)), x)
    assert bool(basis) == (basis != Basis())


@pytest.mark.parametrize("basis", BASES)
def test_products_are_those_of_the_matrix_as_it_was(basis: Basis) -> None:
    x, w = random(7, 40), random(6, 40).flip(0)
    torch.testing.assert_close(basis.to(x) @ basis.to(w).T, x @ w.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(basis.both(x.T @ x), basis.to(x).T @ basis.to(x), rtol=1e-4, atol=1e-4)


def test_the_order_comes_before_the_rotation() -> None:
    x = torch.zeros(1, 40)
    x[0, ORDER[0]] = 1.0
    assert torch.equal(Basis(CHANNELS, 16).to(x)[0] != 0, torch.arange(40) < 16)


@pytest.mark.parametrize("basis", BASES)
def test_a_packed_matrix_stands_for_the_matrix_in_natural_order(basis: Basis) -> None:
    weight, x = random(20, 40), random(3, 40)
    spec = QuantSpec(8, 8, channels=basis.channels, rotation=basis.rotation)
    assert basis_of(spec) == basis
    turned = basis.to(weight)
    grid = minmax_grid(turned, spec)
    packed = pack(encode(turned, grid), grid, basis)
    torch.testing.assert_close(dequantize(packed), weight, rtol=0, atol=0.03)
    torch.testing.assert_close(packed_linear(x, packed), x @ dequantize(packed).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dequantize(row_panel(packed, 16, 20)), dequantize(packed)[16:])
    assert check_layout(layout(packed), "layout").get("channels", False) is bool(basis.channels)


def test_what_is_no_order_is_not_stored() -> None:
    weight = random(4, 8)
    grid = minmax_grid(weight, QuantSpec(4, 8))
    packed = pack(encode(weight, grid), grid, Basis(pack_order(range(8))))
    assert reject(packed) is None
    assert "no order of its 8" in str(reject(replace(packed, channels=torch.zeros(8, dtype=torch.int64))))
    assert is_order([2, 0, 1], 3) and not is_order([0, 1], 3) and not is_order([0, 1, 1], 3)


def test_channels_are_sorted_by_falling_size_and_equals_keep_their_place() -> None:
    assert unpack_order(by_size(torch.tensor([1.0, 3.0, 1.0, 2.0]))).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("most", [3, 65535, 65536])
def test_an_order_is_two_or_four_bytes_a_channel(most: int) -> None:
    packed = pack_order([most, 0, 1])
    assert unpack_order(packed).tolist() == [most, 0, 1] and len(packed) == 1 + 3 * (2 if most < 65536 else 4)
    assert pack_order([]) == b"" and not len(unpack_order(b""))
    for damaged in (b"Q1234", packed[:-1], b"\xff"):
        with pytest.raises(ValueError, match=r"order|multiple"):
            unpack_order(damaged)

"""Streamed statistics equal those of all rows at once."""

from __future__ import annotations

import pytest
import torch

from bitfloor.calib.stats import DriftSum, HessianSum, MomentSum, RowCount
from bitfloor.core.errors import BitfloorError


def rows() -> torch.Tensor:
    return torch.randn(60, 7, generator=torch.Generator().manual_seed(0))


def test_hessian_of_pieces_is_the_hessian() -> None:
    x = rows()
    total = HessianSum(7)
    for piece in x.split(13):
        total.add(piece)
    exact = x.double().t() @ x.double()
    assert total.rows == 60 and total.total.dtype == torch.float32
    # 60 products of magnitude about 1 summed in float32 (eps 6e-8): errors stay below 60 * 60 * 6e-8 = 2e-4.
    assert torch.allclose(total.total.double(), exact, rtol=0, atol=2e-4)
    assert torch.allclose(total.mean().double(), exact / 60, rtol=0, atol=4e-6)


def test_hessian_takes_half_precision_rows_exactly() -> None:
    x = rows().half()
    one, other = HessianSum(7), HessianSum(7)
    one.add(x)
    other.add(x.float())
    assert torch.equal(one.total, other.total)


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300, 1000])
def test_a_hessian_summed_in_panels_is_whole_and_symmetric(columns: int) -> None:
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(1))
    total = HessianSum(columns)
    total.add(x[:30])
    assert torch.equal(total.total, total.total.T)
    total.add(x[30:])
    expected = x.double().T @ x.double()
    assert torch.equal(total.total, total.total.T)
    assert torch.allclose(total.total.double(), expected, rtol=0, atol=2e-4)


def test_drift_in_bfloat16_is_rounded_and_no_more() -> None:
    exact, seen = rows(), rows() + 0.1 * rows().flip(1)
    plain, rounded = DriftSum(7), DriftSum(7, products=torch.bfloat16)
    for total in (plain, rounded):
        total.add(exact, seen)
    assert rounded.total.dtype == torch.float32 and not torch.equal(plain.total, rounded.total)
    # Three roundings of relative size 2^-9: two factors and the product.
    limit = 3 * 2**-9 * float((exact - seen).abs().T.matmul(seen.abs()).max())
    assert torch.allclose(plain.total, rounded.total, rtol=0, atol=limit)


def test_drift_of_pieces_is_the_cross_product() -> None:
    exact, seen = rows(), rows() + 0.1 * rows().flip(1)
    total = DriftSum(7)
    for one, other in zip(exact.split(13), seen.split(13), strict=True):
        total.add(one, other)
    # Not symmetric: the difference is on the left.
    expected = (exact - seen).double().T @ seen.double()
    assert torch.allclose(total.total.double(), expected, rtol=0, atol=2e-4)
    assert not torch.allclose(expected, expected.T, atol=1e-2)


def test_moments_are_the_diagonal_of_the_hessian() -> None:
    x, total = rows(), MomentSum(7)
    for piece in x.split(13):
        total.add(piece)
    # Float64 sums of float32 squares: only the last rounding to float32 is left.
    assert torch.allclose(total.mean(), x.double().square().mean(0).float(), rtol=2e-7, atol=0)
    assert torch.equal(total.peak, x.abs().amax(0)) and total.rows == 60


def test_nothing_seen_gives_zeros() -> None:
    moments = MomentSum(3)
    moments.add(torch.empty(0, 3))
    assert moments.mean().tolist() == [0, 0, 0] and HessianSum(2).mean().tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("shape", [(4, 6), (7,), (1, 4, 7)])
def test_rows_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    for total in (HessianSum(7), MomentSum(7)):
        with pytest.raises(BitfloorError, match="with 7 inputs"):
            total.add(torch.zeros(shape))


def test_starved_experts_are_those_with_few_rows() -> None:
    count = RowCount()
    count.add("a", torch.zeros(3, 2))
    count.add("a", torch.zeros(2, 2))
    count.add("b", torch.zeros(4, 2))
    assert count.rows == {"a": 5, "b": 4}
    assert count.starved(["a", "b", "never"], 5) == ["b", "never"]

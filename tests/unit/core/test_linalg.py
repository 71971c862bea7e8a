"""The factor GPTQ sweeps with, on good and bad matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError
from bitfloor.core.linalg import inverse_factor


def gram(samples: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, channels, generator=generator, dtype=torch.float64)
    return x.T @ x


def test_the_factor_squares_to_the_damped_inverse() -> None:
    hessian = gram(200, 24)
    factor, used = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert used == 0.01
    assert torch.equal(factor, factor.triu())
    assert float(factor.diagonal().min()) > 0
    # float64 with a condition number of about ten.
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)


def test_no_damping_is_used_when_none_is_asked_for_and_none_is_needed() -> None:
    hessian = gram(200, 24)
    factor, used = inverse_factor(hessian, 0.0)
    assert used == 0.0
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_rank_deficient_matrix_is_damped_and_says_so() -> None:
    hessian = gram(10, 24)
    factor, used = inverse_factor(hessian, 0.0)
    assert used == 1e-4
    assert bool(torch.isfinite(factor).all())


def test_an_indefinite_matrix_raises_the_damping_tenfold_until_it_is_enough() -> None:
    # [[1, 3], [3, 1]] has the eigenvalue -2 and a mean diagonal of 1: the damping must exceed 2.
    hessian = torch.full((2, 2), 3.0) - 2.0 * torch.eye(2)
    _, used = inverse_factor(hessian, 0.03)
    assert used == pytest.approx(3.0)  # 0.03 and 0.3 leave it indefinite; tenfold steps, up to decimal rounding


def test_dead_channels_are_decoupled_and_do_not_dilute_the_damping() -> None:
    live = gram(100, 5)
    hessian = torch.zeros(8, 8, dtype=torch.float64)
    hessian[:5, :5] = live
    factor, _ = inverse_factor(hessian, 0.01)
    alone, _ = inverse_factor(live, 0.01)
    # Same numbers through a Cholesky of another size: float64 rounding.
    torch.testing.assert_close(factor[:5, :5], alone, rtol=1e-12, atol=0)
    assert torch.equal(factor[5:, 5:], torch.eye(3, dtype=torch.float64))
    assert factor[:5, 5:].abs().max() == 0


def test_a_matrix_of_zeros_is_all_dead() -> None:
    factor, used = inverse_factor(torch.zeros(4, 4), 0.01)
    assert torch.equal(factor, torch.eye(4, dtype=torch.float64))
    assert used == 0.01


def test_the_matrix_is_not_changed() -> None:
    hessian = gram(10, 24)
    before = hessian.clone()
    inverse_factor(hessian, 0.0)
    assert torch.equal(hessian, before)


def test_a_hopeless_matrix_is_refused_with_its_size_and_the_last_damping() -> None:
    hessian = torch.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1e9
    with pytest.raises(BitfloorError, match=r"6 channels .* damping 10000; calibrate on more"):
        inverse_factor(hessian, 0.01)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_the_scale_of_the_matrix_only_scales_the_factor(size: float) -> None:
    hessian = gram(60, 12)
    factor, _ = inverse_factor(hessian, 0.01)
    scaled, _ = inverse_factor(hessian * size, 0.01)
    torch.testing.assert_close(scaled * size**0.5, factor, rtol=1e-10, atol=0)  # float64, well conditioned

"""Errors in the units of reports."""

from __future__ import annotations

import math

import pytest
import torch

from bitfloor.core.metrics import output_error, relative_error


def test_relative_error_by_hand() -> None:
    reference, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert relative_error(reference, other) == 1 / 25
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.zeros(2), other) == float("inf")


def test_relative_error_is_summed_beyond_half_precision() -> None:
    # 70,000 unit errors overflow a float16 sum.
    reference = torch.ones(70_000, dtype=torch.float16)
    assert relative_error(reference, torch.zeros_like(reference)) == 1.0


def test_output_error_is_the_error_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 12, generator=generator), torch.randn(7, 12, generator=generator)
    other = weight + 0.1 * torch.randn(7, 12, generator=generator)
    direct = (x @ (other - weight).T).square().sum() / (x @ weight.T).square().sum()
    # Same sum in another order: float32 rounding over 50 * 12 terms.
    assert output_error(weight, other, x.T @ x) == pytest.approx(float(direct), rel=1e-4)


def test_output_error_does_not_depend_on_the_scale_of_the_hessian_and_ignores_dead_channels() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(50, 6, generator=generator), torch.randn(3, 6, generator=generator)
    x[:, 2] = 0
    hessian, other = x.T @ x, weight.clone()
    other[:, 2] += 5
    assert output_error(weight, other, hessian) == 0.0
    other[:, 1] += 1
    # A power of two scales every intermediate number exactly.
    assert output_error(weight, other, hessian) == output_error(weight, other, hessian * 0.25)


def test_output_error_is_never_negative_and_finite_on_a_matrix_of_zeros() -> None:
    assert output_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0.0
    assert output_error(torch.ones(2, 3), torch.zeros(2, 3), -1e-9 * torch.eye(3)) == 0.0


def test_an_error_that_is_not_a_number_is_not_reported_as_none() -> None:
    hessian = torch.eye(3)
    hessian[0, 0] = float("nan")
    assert math.isnan(output_error(torch.ones(2, 3), torch.zeros(2, 3), hessian))
    assert relative_error(torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])) != 0.0

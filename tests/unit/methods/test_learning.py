"""What methods that learn a block share: which batches decide, and in which type is multiplied."""

from __future__ import annotations

import pytest
import torch

from bitfloor.methods.learning import mean_square, spread


@pytest.mark.parametrize(
    ("length", "count", "expected"), [(8, 4, [0, 2, 4, 6]), (3, 4, [0, 1, 2]), (7, 3, [0, 2, 4]), (1, 1, [0])]
)
def test_the_fixed_batches_are_spread_over_all(length: int, count: int, expected: list[int]) -> None:
    assert spread(range(length), count) == expected


def test_the_largest_errors_are_left_out_of_value_and_gradient() -> None:
    difference = torch.tensor([[1.0, -2.0, 30.0], [0.5, -40.0, 3.0]], requires_grad=True)
    value = mean_square(difference, 0.34)
    value.backward()
    assert float(value.detach()) == pytest.approx((1 + 4 + 0.25 + 9) / 6)
    assert difference.grad is not None
    torch.testing.assert_close(difference.grad * 3, torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 3.0]]))


@pytest.mark.parametrize("suppress", [0.0, 0.1])
def test_a_share_of_less_than_one_element_leaves_nothing_out(suppress: float) -> None:
    difference = torch.tensor([3.0, -4.0])
    assert float(mean_square(difference, suppress)) == 12.5

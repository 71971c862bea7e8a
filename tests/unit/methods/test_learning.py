"""What methods that learn a block share: which batches decide, and in which type is multiplied."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from unit.methods.toy_block import ToyBlock, batches

from bitfloor.core.spec import QuantSpec
from bitfloor.methods.learning import learn_block, mean_square, product_type, spread
from bitfloor.solvers.block_opt import Schedule
from bitfloor.solvers.signround import SignRound


@pytest.mark.parametrize(
    ("length", "count", "expected"), [(8, 4, [0, 2, 4, 6]), (3, 4, [0, 1, 2]), (7, 3, [0, 2, 4]), (1, 1, [0])]
)
def test_the_fixed_batches_are_spread_over_all(length: int, count: int, expected: list[int]) -> None:
    assert spread(range(length), count) == expected


@pytest.mark.parametrize(
    ("precision", "has", "expected"),
    [
        ("float32", {"avx512_bf16": True}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
        ("auto", {"avx512_bf16": True}, torch.bfloat16),
        ("auto", {"bf16": True}, torch.bfloat16),
        ("auto", {"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_bfloat16_is_taken_where_it_is_fast(
    precision: str, has: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert product_type(precision, "cpu") is expected


class WatchedBlock(ToyBlock):
    """Notes the type in which its first product was made."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def forward(self, x: Tensor, batch: int, overrides: Mapping[str, Tensor] | None = None) -> Tensor:
        if overrides:
            self.types.append((x @ overrides["b"].T).dtype)
        return super().forward(x, batch, overrides)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_are_made_in_that_type_and_learning_works_in_both(precision: str) -> None:
    block, inputs = WatchedBlock(), batches()
    learnt = {name: SignRound(block.weight(name), QuantSpec(2, 8)) for name in block.weights}
    outcome = learn_block(block, inputs, inputs, learnt, Schedule(40), precision)
    assert set(block.types) == {getattr(torch, precision)}
    assert outcome.note is None and outcome.after < 0.8 * outcome.before
    assert all(one.shift.dtype == torch.float32 for one in learnt.values())


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

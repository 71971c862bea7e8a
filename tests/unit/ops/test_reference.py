"""The reference product against a dense one, over panel borders, dtypes and orders."""

from __future__ import annotations

import pytest
import torch
from packing import random_segment, rtn

from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.core.spec import BITS
from bitfloor.ops import reference


def _weight(rows: int = 50) -> PackedWeight:
    generator = torch.Generator().manual_seed(3)
    first = random_segment(generator, rows, 20, 4, channel_scale=True)
    second = random_segment(generator, rows, 40, 1, start=20, zero="offset")
    return PackedWeight((rows, 70), (first, second), torch.randint(0, 70, (60,), generator=generator))


@pytest.mark.parametrize("bits", BITS)
def test_the_product_is_that_of_the_dense_weight(bits: int) -> None:
    weight = rtn(torch.randn(33, 50, generator=torch.Generator().manual_seed(bits)), bits, 32)
    x = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(33.0)
    dense = dequantize(weight)
    # One panel: the same product on the same weights, so equality is exact.
    assert torch.equal(reference.packed_linear(x, weight, bias), torch.nn.functional.linear(x, dense, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_panels_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    weight, bias = _weight(), torch.randn(50, generator=torch.Generator().manual_seed(5))
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(4)).to(dtype)
    monkeypatch.setattr(reference, "CPU_PANEL_WEIGHTS", 16 * 70)
    assert list(reference.panels(50, 70, x.device)) == [(0, 16), (16, 32), (32, 48), (48, 50)]
    y = reference.packed_linear(x, weight, bias)
    exact = x.double() @ dequantize(weight, dtype).double().T + bias.to(dtype).double()
    assert y.dtype == dtype
    # Accumulated in float32 and rounded once: half a unit in the last place of the result, doubled for the float32 sum.
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() * 2


def test_an_embedding_lookup_is_a_row_of_the_dense_weight() -> None:
    weight = _weight()
    ids = torch.tensor([[49, 0, 17], [17, 16, 15]])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(reference.packed_embedding(weight, ids, dtype), dequantize(weight, dtype)[ids])
    none = reference.packed_embedding(weight, torch.empty(2, 0, dtype=torch.long), torch.float32)
    assert none.shape == (2, 0, 70)

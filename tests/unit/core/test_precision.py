"""In which type matrices are multiplied."""

from __future__ import annotations

import pytest
import torch

from bitfloor.core.precision import product_type


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

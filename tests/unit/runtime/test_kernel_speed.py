"""``bitfloor bench kernels`` on small matrices: the cases, the check before the clock, the document. No speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.ops import packed_native
from bitfloor.runtime import kernel_speed
from bitfloor.runtime.kernel_speed import CASES, KernelBench, bench_kernels, form_of

SHAPE = (40, 256)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megabytes instead of hundreds of them."""
    if packed_native.load().library is None:
        pytest.skip("the packed kernels were not built")
    monkeypatch.setattr(kernel_speed, "FOOTPRINT", 1 << 18)
    monkeypatch.setattr(kernel_speed, "READ", 1 << 16)
    monkeypatch.setattr(kernel_speed, "SHAPE", SHAPE)
    yield


@pytest.mark.parametrize("case", CASES)
def test_segments_fill_the_columns_and_end_with_tiles(case: str) -> None:
    form = form_of(case, (16, 11008))
    assert sum(segment.columns for segment in form.segments) == 11008
    assert all(segment.columns % 32 == 0 for segment in form.segments)


def test_the_document(small: None) -> None:
    threads, said = torch.get_num_threads(), []
    found = bench_kernels([1], 0.0, 2, said.append)
    assert [run["case"] for run in found["runs"]] == list(CASES) and len(said) == len(CASES)
    assert found["shape"] == list(SHAPE) and torch.get_num_threads() == threads
    for run in found["runs"]:
        assert run["matrices"] * run["bytes"] >= 1 << 18 and run["read_gb_s"] > 0
        for mode in ("int8", "float"):
            assert run[mode]["us"] > 0 and run[mode]["gb_s"] >= 0


def test_kernels_that_compute_something_else_are_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = KernelBench(SHAPE, 0.0, 1)
    honest = bench.library.product

    def wrong(*given: Any) -> torch.Tensor:
        return honest(*given) + 1.0

    monkeypatch.setattr(bench.library, "product", wrong)
    with pytest.raises(BitfloorError, match="do not agree"):
        bench.measure("2 bits, g64")


def test_without_kernels_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_native, "load", lambda: packed_native.Loaded(None, "it was not built"))
    with pytest.raises(InputError, match="no packed kernels to measure: it was not built"):
        bench_kernels([1], 0.0, 1, lambda text: None)

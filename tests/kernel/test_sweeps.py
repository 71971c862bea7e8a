"""The native kernels of the column loops and of the grid search against their definitions in torch: equal values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitfloor.ops import native, search, search_reference, sweeps, sweeps_reference
from bitfloor.ops.native import Library

# Columns and rows: strips of 64 rows, whole and broken; one of each.
SHAPES = [(1, 1), (5, 3), (64, 64), (128, 65), (33, 200), (7, 128)]


@pytest.fixture
def library() -> Library:
    found = native.load(native.FOLDER)
    if found.library is None:
        pytest.skip(f"the native library is not used here: {found.reason}")
    return found.library


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factor(columns: int) -> Tensor:
    x = normal(3 * columns, columns, seed=1)
    return torch.linalg.cholesky(x.T @ x / columns, upper=True).contiguous()


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_gptq_columns(library: Library, columns: int, rows: int, bits: int) -> None:
    work, local = normal(columns, rows), factor(columns)
    work[:, rows // 2] *= 1e4  # a row far outside of its grid
    scale = normal(columns, rows, seed=2).abs() * 0.3 + 0.01
    scale[:, ::2] *= -1.0
    shift = -scale * (1 << bits) / 2
    tops = torch.full((columns,), float((1 << bits) - 1))
    found: list[tuple[Tensor, ...]] = []
    for kernel in (library.gptq_columns, sweeps_reference.gptq_columns):
        own = work.clone()
        codes, errors = torch.empty_like(own, dtype=torch.uint8), torch.empty_like(own)
        kernel(own, local, scale, shift, tops, codes, errors)
        found.append((codes, errors, own))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert int(found[0][0].max()) <= (1 << bits) - 1 and len(found[0][0].unique()) > 1 or work.numel() == 1


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("bits", [2, 4])
def test_descend_columns(library: Library, columns: int, rows: int, bits: int) -> None:
    x = normal(3 * columns, columns, seed=1)
    local, top = x.T @ x, float((1 << bits) - 1)
    codes = (normal(columns, rows) + top / 2).round().clamp(0, top)
    error = normal(columns, rows, seed=3)
    pivots = local.diagonal().clone()
    pivots[columns // 2] = torch.inf
    scale = normal(rows, seed=4)
    found: list[tuple[Tensor, ...]] = []
    for kernel in (library.descend_columns, sweeps_reference.descend_columns):
        own, slope, off = codes.clone(), local @ error, error.clone()
        kernel(own, slope, off, local, pivots, scale, top)
        found.append((own, slope, off))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0][columns // 2], codes[columns // 2])
    if columns > 1:
        assert not torch.equal(found[0][0], codes)


@pytest.mark.parametrize(
    ("rows", "columns", "size"), [(1, 1, 1), (5, 128, 64), (7, 150, 64), (3, 33, 7), (2, 700, 700)]
)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_best_grid_and_fit_sums(library: Library, rows: int, columns: int, size: int, bits: int) -> None:
    weight, importance = normal(rows, columns), normal(columns, seed=5).square()
    weight[0] *= 1e4
    groups, top = -(-columns // size), float((1 << bits) - 1)
    tops = torch.full((groups,), top)
    scales = normal(9, rows, groups, seed=6) * 0.5
    scales[0] = 2.0**-24
    zeros = (normal(9, rows, groups, seed=7) + top / 2).round().clamp(0, top)
    found: list[tuple[Tensor, ...]] = []
    for made in (library, search_reference):
        best = (torch.ones(rows, groups), torch.zeros(rows, groups), torch.full((rows, groups), torch.inf))
        made.best_grid(weight, importance, tops, (scales, zeros), best, size)
        found.append((*best, *made.fit_sums(weight, importance, tops, best[0], best[1], size)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # An independent look at the first group: the best of all is taken.
    first = slice(0, min(size, columns))
    code = ((weight[-1, first] / scales[:, -1, :1]).round() + zeros[:, -1, :1]).clamp(0, top) - zeros[:, -1, :1]
    errors = ((weight[-1, first] - code * scales[:, -1, :1]).square() * importance[first]).double().sum(-1)
    assert float(found[0][2][-1, 0]) == pytest.approx(float(errors.min()), rel=1e-5)


def test_threads_change_nothing(library: Library) -> None:
    work, local = normal(128, 5000), factor(128)
    scale, tops = torch.full_like(work, 0.5), torch.full((128,), 3.0)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(sweeps.gptq_columns(work.clone(), local, scale, -1.5 * scale, tops))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


BAD: list[tuple[Any, str]] = [
    (lambda: sweeps.gptq_columns(normal(2, 3), normal(3, 3), normal(2, 3), normal(2, 3), normal(2)), "local is"),
    (
        lambda: sweeps.gptq_columns(normal(2, 3).double(), normal(2, 2), normal(2, 3), normal(2, 3), normal(2)),
        "work is",
    ),
    (
        lambda: sweeps.descend_columns(
            normal(2, 3), normal(2, 3), normal(2, 2), normal(2, 2), normal(2), normal(3), 3.0
        ),
        "error is",
    ),
    (lambda: search.fit_sums(normal(2, 9), normal(8), normal(3), normal(2, 3), normal(2, 3), 4), "importance has"),
    (lambda: search.fit_sums(normal(2, 9), normal(9), normal(3), normal(2, 2), normal(2, 3), 4), "scale is"),
    (lambda: search.fit_sums(normal(2, 9), normal(9), normal(3), normal(2, 3), normal(2, 3), 0), "groups of 0"),
    (
        lambda: search.best_grid(
            normal(2, 8), normal(8), normal(2), (normal(5, 2, 2), normal(4, 2, 2)), (normal(2, 2),) * 3, 4
        ),
        "zeros is",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_shapes_that_do_not_fit_never_reach_a_kernel(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_dense_goes_to_the_reference() -> None:
    work = normal(6, 40).T
    local, scale = factor(40), torch.full((40, 6), 0.5)
    tops = torch.full((40,), 3.0)
    dense = sweeps.gptq_columns(work.contiguous(), local, scale, -scale, tops)
    assert all(
        torch.equal(one, other)
        for one, other in zip(sweeps.gptq_columns(work, local, scale, -scale, tops), dense, strict=True)
    )

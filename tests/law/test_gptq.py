"""Symmetries of GPTQ: it may not matter how channels are numbered, what the unit is, or who else is in the stack."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfloor.core.affine import Grid, encode
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.solvers.gptq import gptq
from bitfloor.solvers.ranges import minmax_grid, search_grid

LAW = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS, ROWS, COLUMNS = st.integers(0, 2**16), st.integers(1, 8), st.integers(2, 48)
WIDTHS = st.sampled_from(BITS)


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x.T @ x


@LAW
@given(WIDTHS, ROWS, COLUMNS, SEEDS)
def test_renumbering_channels_renumbers_the_codes_of_act_order(bits: int, rows: int, columns: int, seed: int) -> None:
    weight, hessian = problem(rows, columns, seed)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    grid = minmax_grid(weight, QuantSpec(bits, -1))  # one group: the grid does not know the order of its columns
    permuted = gptq(weight[:, order], hessian[order][:, order], grid)
    # The sweep sees the same numbers in the same sequence, so this is exact.
    assert torch.equal(permuted.codes, gptq(weight, hessian, grid).codes[:, order])


@LAW
@given(WIDTHS, ROWS, COLUMNS, SEEDS, st.booleans(), st.sampled_from([2.0**-20, 4.0, 2.0**30]))
def test_the_unit_of_the_hessian_is_irrelevant(
    bits: int, rows: int, columns: int, seed: int, act_order: bool, factor: float
) -> None:
    weight, hessian = problem(rows, columns, seed)
    grid = minmax_grid(weight, QuantSpec(bits, 16))
    one = gptq(weight, hessian, grid, act_order=act_order)
    # A power of four has an exact root, so every number of the factorisation is scaled exactly.
    assert torch.equal(gptq(weight, hessian * factor, grid, act_order=act_order).codes, one.codes)


@LAW
@given(WIDTHS, ROWS, COLUMNS, SEEDS, st.booleans(), st.sampled_from([-1.0, 0.125, 1024.0]))
def test_the_unit_of_the_weights_is_irrelevant(
    bits: int, rows: int, columns: int, seed: int, act_order: bool, factor: float
) -> None:
    weight, hessian = problem(rows, columns, seed)
    grid = search_grid(weight, hessian.diagonal(), QuantSpec(bits, 16))
    offset = None if grid.offset is None else grid.offset * factor
    scaled = replace(grid, scale=grid.scale * factor, offset=offset)
    one, other = (gptq(w, hessian, g, act_order=act_order) for w, g in ((weight, grid), (weight * factor, scaled)))
    assert torch.equal(one.codes, other.codes)


@LAW
@given(WIDTHS, st.integers(2, 12), COLUMNS, SEEDS, st.data())
def test_rows_of_a_stack_do_not_know_each_other(
    bits: int, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    weight, hessian = problem(rows, columns, seed)
    cut = data.draw(st.integers(1, rows - 1))
    split = torch.split(weight, [cut, rows - cut])
    parts = [gptq(part, hessian, minmax_grid(part, QuantSpec(bits, 16))).codes for part in split]
    whole = gptq(weight, hessian, minmax_grid(weight, QuantSpec(bits, 16))).codes
    assert torch.equal(torch.cat(parts), whole)  # within one block of columns the sweep is elementwise


@LAW
@given(WIDTHS, ROWS, COLUMNS, SEEDS, st.booleans())
def test_without_correlation_there_is_nothing_to_compensate(
    bits: int, rows: int, columns: int, seed: int, act_order: bool
) -> None:
    weight, hessian = problem(rows, columns, seed)
    diagonal = torch.diag(hessian.diagonal())
    grid = minmax_grid(weight, QuantSpec(bits, 16))
    assert torch.equal(gptq(weight, diagonal, grid, act_order=act_order).codes, encode(weight, grid))


@LAW
@given(WIDTHS, ROWS, COLUMNS, SEEDS, st.booleans())
def test_codes_stay_in_range_and_repeat(bits: int, rows: int, columns: int, seed: int, act_order: bool) -> None:
    weight, hessian = problem(rows, columns, seed)
    grid: Grid = minmax_grid(0.3 * weight, QuantSpec(bits, 16))  # a grid that is too small: most updates saturate
    first = gptq(weight, hessian, grid, act_order=act_order)
    assert int(first.codes.max()) < 1 << bits
    assert torch.equal(first.codes, gptq(weight, hessian, grid, act_order=act_order).codes)

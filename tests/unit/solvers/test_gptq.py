"""GPTQ against the closed form it is a fast way to compute, and on Hessians that try to break it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode
from bitfloor.core.errors import BitfloorError
from bitfloor.core.metrics import output_error
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.solvers.gptq import BLOCK, GridSearch, gptq
from bitfloor.solvers.ranges import minmax_grid


@dataclass
class Case:
    weight: Tensor
    hessian: Tensor


def correlated(rows: int, columns: int, seed: int = 0, samples: int | None = None) -> Case:
    """Normal weights, and the Hessian of inputs whose channels are mixed and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    size = torch.randn(columns, generator=generator).exp()
    x = torch.randn(samples or 4 * columns, columns, generator=generator) @ mix * size
    return Case(weight, x.T @ x)


def textbook(case: Case, grid: Grid, damping: float, act_order: bool) -> tuple[Tensor, float]:
    """Fix one column after the other; solve for all columns not yet fixed from the original weights, in float64.

    With ``S`` the fixed and ``R`` the remaining columns the least-squares solution is
    ``W_R - (What_S - W_S) H_SR H_RR^-1``. Returns the codes, and how close the closest rounding was to a tie.
    """
    weight, hessian = case.weight.double(), case.hessian.double().clone()
    columns = weight.shape[1]
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    order = case.hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    scale, shift, top = (part.double() for part in grid.columns(columns))
    codes, fixed = torch.zeros(weight.shape, dtype=torch.uint8), weight.clone()
    closest = 0.5
    for step in range(columns):
        done, left = order[:step], order[step:]
        mixed = (fixed - weight)[:, done] @ hessian[done][:, left]
        current = weight[:, left] - torch.linalg.solve(hessian[left][:, left], mixed.T).T
        at = left[0]
        exact = (current[:, 0] - shift[:, at]) / scale[:, at]
        inside = (exact > -0.5) & (exact < top[at] + 0.5)
        distance = (exact - exact.floor() - 0.5).abs()[inside]
        closest = min(closest, float(distance.min())) if distance.numel() else closest
        code = exact.round().clamp(torch.zeros(()).double(), top[at])
        codes[:, at] = code.to(torch.uint8)
        fixed[:, at] = code * scale[:, at] + shift[:, at]
    return codes, closest


TIE = 1e-4  # the sweep works in float32: its updated weights are good to less than this, in steps of the grid


def clear_case(rows: int, columns: int, spec: QuantSpec, act_order: bool, **options: Any) -> tuple[Case, Grid, Tensor]:
    """A case whose textbook solution never rounds close to a tie, so that its codes are the only right ones."""
    damping, widths = options.get("damping", 0.01), options.get("widths")
    for seed in range(20):
        case = correlated(rows, columns, seed)
        grid = minmax_grid(case.weight, spec, widths)
        codes, closest = textbook(case, grid, damping, act_order)
        if closest > TIE:
            return case, grid, codes
    raise AssertionError("twenty seeds in a row were close to a tie")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_equals_the_textbook_solution(bits: int, act_order: bool) -> None:
    case, grid, expected = clear_case(6, 40, QuantSpec(bits, 16), act_order)
    result = gptq(case.weight, case.hessian, grid, act_order=act_order)
    assert torch.equal(result.codes, expected)
    assert not torch.equal(result.codes, encode(case.weight, grid))
    assert result.damping == 0.01
    assert result.codes.dtype == torch.uint8


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 45])
def test_errors_cross_the_boundary_of_a_block(columns: int, act_order: bool) -> None:
    case, grid, expected = clear_case(3, columns, QuantSpec(3, 64), act_order)
    assert torch.equal(gptq(case.weight, case.hessian, grid, act_order=act_order).codes, expected)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_may_have_different_widths(symmetric: bool, act_order: bool) -> None:
    widths = torch.tensor([2, 3, 4, 3])
    case, grid, expected = clear_case(5, 56, QuantSpec(3, 16, symmetric), act_order, widths=widths)
    codes = gptq(case.weight, case.hessian, grid, act_order=act_order).codes
    assert torch.equal(codes, expected)
    for group, bits in enumerate(widths.tolist()):
        assert int(codes[:, 16 * group : 16 * group + 16].max()) < 1 << bits


def test_one_bit_groups_and_offsets() -> None:
    case, grid, expected = clear_case(5, 48, QuantSpec(2, 16), True, widths=torch.tensor([1, 2, 1]))
    assert grid.offset is not None
    assert torch.equal(gptq(case.weight, case.hessian, grid).codes, expected)


def test_undamped() -> None:
    case, grid, expected = clear_case(4, 32, QuantSpec(3, 32), False, damping=0.0)
    result = gptq(case.weight, case.hessian, grid, damping=0.0, act_order=False)
    assert torch.equal(result.codes, expected)
    assert result.damping == 0.0


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_diagonal_hessian_rounds_to_nearest_bit_for_bit(bits: int, act_order: bool) -> None:
    weight = correlated(9, 150).weight
    diagonal = torch.randn(150, generator=torch.Generator().manual_seed(bits)).exp()
    grid = minmax_grid(weight, QuantSpec(bits, 64))
    for hessian in (torch.diag(diagonal), torch.eye(150), torch.diag(diagonal).double()):
        assert torch.equal(gptq(weight, hessian, grid, act_order=act_order).codes, encode(weight, grid))


def test_weights_already_on_the_grid_stay() -> None:
    case = correlated(6, 40)
    grid = minmax_grid(case.weight, QuantSpec(4, 16))
    codes = encode(case.weight, grid)
    assert torch.equal(gptq(decode(codes, grid), case.hessian, grid).codes, codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_channels_are_rounded_to_nearest_and_disturb_nobody(act_order: bool) -> None:
    dead = torch.tensor([0, 7, 8, 39])
    live = torch.tensor([channel for channel in range(40) if channel not in dead.tolist()])
    # The grid of the live channels is one group a row, so it also serves a matrix that has the dead ones between them.
    case, grid, expected = clear_case(6, len(live), QuantSpec(3, -1), act_order)
    weight, hessian = correlated(6, 40, seed=99).weight, torch.zeros(40, 40)
    weight[:, live] = case.weight
    hessian[live.unsqueeze(1), live] = case.hessian
    wider = replace(grid, group_size=40)
    codes = gptq(weight, hessian, wider, act_order=act_order).codes
    assert torch.equal(codes[:, dead], encode(weight, wider)[:, dead])
    assert torch.equal(codes[:, live], expected)


def test_a_hessian_of_zeros_rounds_to_nearest() -> None:
    weight = correlated(4, 20).weight
    grid = minmax_grid(weight, QuantSpec(2, 8))
    assert torch.equal(gptq(weight, torch.zeros(20, 20), grid).codes, encode(weight, grid))


@pytest.mark.parametrize("act_order", [False, True])
def test_fewer_samples_than_channels_raise_the_damping_and_say_so(act_order: bool) -> None:
    case = correlated(16, 64, seed=4, samples=20)
    grid = minmax_grid(case.weight, QuantSpec(3, 32))
    result = gptq(case.weight, case.hessian, grid, damping=0.0, act_order=act_order)
    assert result.damping == 1e-4
    nearest = decode(encode(case.weight, grid), grid)
    found = decode(result.codes, grid)
    assert output_error(case.weight, found, case.hessian) < output_error(case.weight, nearest, case.hessian)


def test_the_usual_damping_is_enough_for_a_rank_deficient_hessian() -> None:
    case = correlated(16, 64, seed=4, samples=20)
    assert gptq(case.weight, case.hessian, minmax_grid(case.weight, QuantSpec(3, 32))).damping == 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(3, 3), (2, 5)])
def test_a_hessian_that_is_not_finite_is_refused(value: float, where: tuple[int, int]) -> None:
    case = correlated(4, 20)
    case.hessian[where] = value
    with pytest.raises(BitfloorError, match="NaN or Inf"):
        gptq(case.weight, case.hessian, minmax_grid(case.weight, QuantSpec(3, 8)))


def test_operands_are_not_changed() -> None:
    case = correlated(4, 20)
    weight, hessian = case.weight.clone(), case.hessian.clone()
    for act_order in (False, True):
        gptq(case.weight, case.hessian, minmax_grid(case.weight, QuantSpec(3, 8)), act_order=act_order)
    assert torch.equal(case.weight, weight)
    assert torch.equal(case.hessian, hessian)


def test_act_order_sweeps_large_channels_first() -> None:
    # Two fully correlated channels: whatever comes second absorbs the error of the first.
    weight, grid = torch.tensor([[0.4, 0.4]]), Grid(torch.ones(1, 1), torch.zeros(1, 1), None, torch.tensor([4]), 2)
    x = torch.tensor([[1.0, 4.0]])
    hessian = x.T @ x
    # In order: 0.4 -> 0, and channel 1 takes its 0.4 / 4: 0.5 - damping -> 0. By size: channel 1 -> 0 leaves 1.6 to
    # channel 0: 2.0 - damping -> 2, and the output 2 = 0.4 * 1 + 0.4 * 4 is exact.
    assert gptq(weight, hessian, grid, damping=1e-3, act_order=False).codes.tolist() == [[0, 0]]
    assert gptq(weight, hessian, grid, damping=1e-3, act_order=True).codes.tolist() == [[2, 0]]


@pytest.mark.parametrize("columns", [BLOCK, 2 * BLOCK + 10])
def test_stacked_rows_equal_separate_rows(columns: int) -> None:
    case = correlated(24, columns, seed=6)
    grid = minmax_grid(case.weight, QuantSpec(3, 64))
    whole = gptq(case.weight, case.hessian, grid).codes
    split = torch.split(case.weight, [7, 1, 16])
    parts = [gptq(rows, case.hessian, minmax_grid(rows, QuantSpec(3, 64))).codes for rows in split]
    same = (torch.cat(parts) == whole).float().mean()
    # Inside one block the sweep is elementwise. Across blocks a matrix product sums in an order that may depend on the
    # number of rows: a rounding within 1e-6 of a tie may then flip, and with it the rest of that row.
    assert same == 1 if columns <= BLOCK else same > 0.95


# -- grids found on the way ----------------------------------------------------------------------------------------


def textbook_search(case: Case, spec: QuantSpec, act_order: bool) -> tuple[Tensor, list[Grid], float]:
    """As :func:`textbook`, group by group, each grid from the weights that least squares leaves at that moment."""
    weight, hessian = case.weight.double(), case.hessian.double().clone()
    columns, diagonal = weight.shape[1], case.hessian.diagonal()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    groups = [list(range(at, min(at + spec.group_size, columns))) for at in range(0, columns, spec.group_size)]
    numbers = list(range(len(groups)))
    if act_order:
        numbers.sort(key=lambda g: -float(diagonal[groups[g]].double().sum()))
    codes, fixed, grids, done = torch.zeros(weight.shape, dtype=torch.uint8), weight.clone(), {}, []
    closest = 0.5

    def current(left: list[int]) -> Tensor:
        mixed = (fixed - weight)[:, done] @ hessian[done][:, left]
        return weight[:, left] - torch.linalg.solve(hessian[left][:, left], mixed.T).T

    for number in numbers:
        group = groups[number]
        rest = [c for n in numbers[numbers.index(number) + 1 :] for c in groups[n]]
        grid = minmax_grid(current(group + rest)[:, : len(group)].float(), spec)
        grids[number] = grid
        order = sorted(group, key=lambda c: -float(diagonal[c])) if act_order else group
        for step, at in enumerate(order):
            now = current(order[step:] + rest)[:, 0]
            exact = (now - grid.shift[:, 0]) / grid.scale[:, 0]
            inside = (exact > -0.5) & (exact < float(grid.max_code[0]) + 0.5)
            distance = (exact - exact.floor() - 0.5).abs()[inside]
            closest = min(closest, float(distance.min())) if distance.numel() else closest
            code = exact.round().clamp(0, float(grid.max_code[0]))
            codes[:, at] = code.to(torch.uint8)
            fixed[:, at] = code * grid.scale[:, 0] + grid.shift[:, 0]
            done.append(at)
    return codes, [grids[g] for g in range(len(groups))], closest


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_grids_found_on_the_way_equal_the_textbook(bits: int, act_order: bool) -> None:
    spec = QuantSpec(bits, 16)
    search = GridSearch(16, lambda _, part, at: minmax_grid(part, spec))
    for seed in range(20):
        case = correlated(4, 40, seed)  # the last group has 8 columns
        expected, grids, closest = textbook_search(case, spec, act_order)
        if closest > 2e-3:  # scales are rounded to 16 bits from float32 here and from float64 there
            break
    result = gptq(case.weight, case.hessian, search, act_order=act_order)
    scale = torch.cat([grid.scale for grid in grids], 1)
    assert torch.allclose(result.grid.scale, scale, rtol=1.5e-3)
    assert float((result.codes != expected).float().mean()) < 0.01
    assert result.grid.group_size == 16 and result.grid.bits.tolist() == [bits] * 3


@pytest.mark.parametrize("act_order", [False, True])
def test_a_search_is_told_group_and_columns_in_natural_order(act_order: bool) -> None:
    case = correlated(4, 150, 3)
    asked: list[int] = []

    def find(group: int, part: Tensor, at: Tensor) -> Grid:
        asked.append(group)
        assert at.tolist() == list(range(64 * group, min(64 * group + 64, 150)))
        assert part.shape == (4, len(at))
        if len(asked) == 1:  # nothing has been rounded yet
            assert torch.equal(part, case.weight[:, at])
        else:
            assert not torch.equal(part, case.weight[:, at])
        return minmax_grid(part, QuantSpec(2, 64))

    gptq(case.weight, case.hessian, GridSearch(64, find), act_order=act_order)
    sums = [float(part.sum()) for part in case.hessian.diagonal().split(64)]
    assert asked == (sorted(range(3), key=lambda g: -sums[g]) if act_order else [0, 1, 2])


def test_found_groups_may_be_wider_than_a_block_and_of_different_width() -> None:
    widths, size = [2, 4], BLOCK + 40
    case = correlated(4, 2 * size - 30, 1)
    search = GridSearch(size, lambda g, part, _: minmax_grid(part, QuantSpec(widths[g], size)))
    result = gptq(case.weight, case.hessian, search)
    assert result.grid.bits.tolist() == widths
    assert int(result.codes[:, :size].max()) == 3 and int(result.codes[:, size:].max()) == 15
    plain = minmax_grid(case.weight, QuantSpec(2, size), torch.tensor(widths))
    rounded = decode(encode(case.weight, plain), plain)
    solved = decode(result.codes, result.grid)
    assert output_error(case.weight, solved, case.hessian) < output_error(case.weight, rounded, case.hessian)


# -- drifted inputs ------------------------------------------------------------------------------------------------


def drifted(seed: int = 0, samples: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs of the float model, and what they have become in the quantized one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 24, generator=generator)
    exact = torch.randn(samples, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    return weight, exact, exact @ (torch.eye(24) + 0.1 * torch.randn(24, 24, generator=generator))


@pytest.mark.parametrize("act_order", [False, True])
def test_full_correction_without_damping_sweeps_from_the_least_squares_solution(act_order: bool) -> None:
    weight, exact, found = (part.double() for part in drifted())
    best = torch.linalg.lstsq(found, exact @ weight.T).solution.T  # W' with || X W^T - X' W'^T || smallest
    hessian, drift = found.T @ found, (exact - found).T @ found
    grid = minmax_grid(best.float(), QuantSpec(8, 24))
    options = {"damping": 1e-9, "act_order": act_order}
    corrected = gptq(weight.float(), hessian, grid, drift=drift.float(), correction=1.0, **options)
    plain = gptq(best.float(), hessian, grid, **options)
    assert float((corrected.codes != plain.codes).float().mean()) < 0.02  # float32 against float64 near ties
    assert float((corrected.codes != gptq(weight.float(), hessian, grid, **options).codes).float().mean()) > 0.5


def test_correction_brings_the_output_closer_to_the_float_models() -> None:
    wins = 0
    for seed in range(5):
        weight, exact, found = drifted(seed)
        hessian, drift = found.T @ found, (exact - found).T @ found
        search = GridSearch(8, lambda _, part, at: minmax_grid(part, QuantSpec(3, 8)))
        errors = []
        for share in (0.0, 0.5, 1.0):
            solved = gptq(weight, hessian, search, drift=drift, correction=share)
            errors.append(float((found @ decode(solved.codes, solved.grid).T - exact @ weight.T).square().sum()))
        wins += errors[0] > errors[1] > errors[2]
    assert wins == 5


def test_no_share_and_no_drift_change_nothing() -> None:
    weight, exact, found = drifted()
    hessian, drift = found.T @ found, (exact - found).T @ found
    grid = minmax_grid(weight, QuantSpec(3, 8))
    plain = gptq(weight, hessian, grid).codes
    assert torch.equal(gptq(weight, hessian, grid, drift=drift, correction=0.0).codes, plain)
    assert torch.equal(gptq(weight, hessian, grid, drift=torch.zeros_like(drift), correction=0.5).codes, plain)
    with pytest.raises(BitfloorError, match="NaN or Inf"):
        gptq(weight, hessian, grid, drift=drift * float("nan"), correction=0.5)


def test_static_grids_are_those_of_the_corrected_weights() -> None:
    weight, exact, found = drifted()
    hessian, drift = found.T @ found, (exact - found).T @ found
    asked: list[tuple[int, Tensor]] = []

    def find(group: int, part: Tensor, at: Tensor) -> Grid:
        asked.append((group, part.clone()))
        return minmax_grid(part, QuantSpec(3, 10))

    result = gptq(weight, hessian, GridSearch(10, find, static=True), drift=drift, correction=1.0)
    assert [group for group, _ in asked] == [0, 1, 2]
    assert torch.equal(torch.cat([part for _, part in asked], 1), result.target)
    assert not torch.allclose(result.target, weight, atol=1e-2)
    whole = minmax_grid(result.target, QuantSpec(3, 10))
    assert torch.equal(result.grid.scale, whole.scale) and torch.equal(result.grid.shift, whole.shift)


def test_static_search_without_drift_is_a_given_grid() -> None:
    case = correlated(5, 70)
    search = GridSearch(32, lambda _, part, at: minmax_grid(part, QuantSpec(3, 32)), static=True)
    result = gptq(case.weight, case.hessian, search)
    assert torch.equal(result.codes, gptq(case.weight, case.hessian, minmax_grid(case.weight, QuantSpec(3, 32))).codes)
    assert torch.equal(result.target, case.weight)

"""Grids by hand, and grids of weights nobody wants to meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode
from bitfloor.core.errors import InputError
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.solvers.ranges import group_bits, grouped, minmax_grid, normalised, search_grid

KINDS = [(bits, symmetric, dtype) for bits in BITS for symmetric in (False, True) for dtype in ("float16", "bfloat16")]


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def weighted_error(weight: Tensor, grid: Grid, importance: Tensor) -> float:
    """Error of nearest codes on the stored grid, in float64."""
    difference = decode(encode(weight, grid), grid).double() - weight.double()
    return float((difference.square() * importance.double()).sum())


def same_grid(one: Grid, other: Grid) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.shift, other.shift)


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_grouped_pads_the_last_group_with_zeros() -> None:
    assert grouped(torch.tensor([[1.0, 2.0, 3.0]]), 2).tolist() == [[[1.0, 2.0], [3.0, 0.0]]]
    assert grouped(torch.tensor([1.0, 2.0]), 2).tolist() == [[1.0, 2.0]]


def test_group_bits_are_the_specs_unless_given() -> None:
    assert group_bits(QuantSpec(3, 4), 2).tolist() == [3, 3]
    assert group_bits(QuantSpec(3, 4), 2, torch.tensor([2, 4], dtype=torch.int32)).tolist() == [2, 4]


def test_group_bits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(3,\) entries but the matrix has 2 groups"):
        group_bits(QuantSpec(3, 4), 2, torch.tensor([2, 3, 4]))
    with pytest.raises(InputError, match="holds 7; use 1, 2, 3, 4, 5, 6, 8"):
        group_bits(QuantSpec(3, 4), 2, torch.tensor([2, 7]))


@pytest.mark.parametrize(("group_size", "groups"), [(-1, 1), (64, 9), (128, 5), (1000, 1)])
def test_576_columns_at_any_group_size(group_size: int, groups: int) -> None:
    weight = normal(2, 576)
    grid = minmax_grid(weight, QuantSpec(4, group_size))
    assert grid.scale.shape == (2, groups)
    # Half a step of a 4-bit grid over +-4 sigma, and the zero-point's rounding: at most one step, 8 / 15.
    assert float((decode(encode(weight, grid), grid) - weight).abs().max()) < 8 / 15


def test_rows_are_independent_and_so_are_the_chunks_they_are_treated_in(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = normal(23, 40), normal(1, 40, seed=1)[0].square()
    for bits in (1, 2):
        whole = search_grid(weight, importance, QuantSpec(bits, 16))
        monkeypatch.setattr("bitfloor.solvers.ranges.CHUNK", 7 * 40)
        assert same_grid(search_grid(weight, importance, QuantSpec(bits, 16)), whole)
        monkeypatch.undo()


# --- min-max --------------------------------------------------------------------------------------------------------


def test_asymmetric_minmax_by_hand() -> None:
    grid = minmax_grid(torch.tensor([[-1.0, 0.5, 2.0, 0.0]]), QuantSpec(2, -1))
    assert grid.scale.tolist() == [[1.0]]
    assert grid.zero is not None
    assert grid.zero.tolist() == [[1.0]]
    assert not grid.constant_zero


@pytest.mark.parametrize(("weight", "zero"), [([0.25, 0.5, 0.75], 0.0), ([-0.25, -0.5, -0.75], 3.0)])
def test_the_range_includes_zero(weight: list[float], zero: float) -> None:
    grid = minmax_grid(torch.tensor([weight]), QuantSpec(2, -1))
    assert grid.scale.tolist() == [[0.25]]  # 0.75 / 3, not 0.5 / 3
    assert grid.zero is not None
    assert grid.zero.tolist() == [[zero]]
    assert decode(encode(torch.tensor([weight]), grid), grid).tolist() == [weight]


def test_a_padded_last_group_is_not_told_from_one_that_holds_zeros() -> None:
    short = torch.tensor([[1.0, -2.0, 3.0, 1.5, 0.75]])
    full = torch.cat([short, torch.zeros(1, 3)], dim=1)
    for symmetric in (False, True):
        spec = QuantSpec(2, 4, symmetric)
        assert same_grid(minmax_grid(short, spec), minmax_grid(full, spec))
    assert minmax_grid(short, QuantSpec(2, 4)).scale[0, 1] == 0.25


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ([-4.0, 1.0, 3.0], 1.0),  # the negative side is larger: code 0 is -4
        ([4.0, 1.0, -3.0], -1.0),  # the positive side is larger: code 0 is +4
        ([4.0, -4.0, 0.0], -1.0),  # a tie
    ],
)
def test_symmetric_grids_put_the_larger_side_on_code_zero(weight: list[float], scale: float) -> None:
    values = torch.tensor([weight])
    grid = minmax_grid(values, QuantSpec(3, -1, symmetric=True))
    assert grid.scale.tolist() == [[scale]]
    assert grid.constant_zero
    assert grid.zero is not None
    assert grid.zero.tolist() == [[4.0]]
    codes = encode(values, grid)
    assert codes[0, 0] == 0
    assert decode(codes, grid)[0, 0] == weight[0]


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), KINDS)
def test_a_constant_row_is_nearly_exact(bits: int, symmetric: bool, dtype: str) -> None:
    for value in (0.3, -0.3):
        weight = torch.full((2, 10), value)
        grid = minmax_grid(weight, QuantSpec(bits, 4, symmetric, dtype))
        back = decode(encode(weight, grid), grid)
        # One end of the range lies on a code, up to the scale's storage: half an ulp of the 16-bit type, 2^-9 or 2^-12.
        assert float((back - weight).abs().max()) <= 0.3 * (2**-8 if dtype == "bfloat16" else 2**-11)


def test_one_bit_groups_are_the_mean_plus_and_minus_the_mean_distance() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    grid = minmax_grid(weight, QuantSpec(1, -1))
    # mean 3, distances 2, 1, 0, 3: levels 3 - 1.5 and 3 + 1.5
    assert grid.offset is not None
    assert grid.offset.tolist() == [[1.5]]
    assert grid.scale.tolist() == [[3.0]]
    assert decode(encode(weight, grid), grid).tolist() == [[1.5, 1.5, 1.5, 4.5]]
    assert grid.zero is None


def test_one_bit_means_leave_the_padding_of_a_short_group_out() -> None:
    grid = minmax_grid(torch.tensor([[0.0, 0.0, 0.0, 0.0, 5.0, 7.0]]), QuantSpec(1, 4))
    assert grid.offset is not None
    assert grid.offset[0, 1] == 5.0
    assert grid.scale[0, 1] == 2.0


# --- search ---------------------------------------------------------------------------------------------------------


def test_one_bit_search_finds_the_two_weighted_levels() -> None:
    # Two clusters of different size: the mean-and-distance levels are not their centres, the class means are.
    weight = torch.tensor([[-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 3.0, 3.0]])
    grid = search_grid(weight, torch.ones(8), QuantSpec(1, -1))
    assert decode(encode(weight, grid), grid).tolist() == weight.tolist()


@pytest.mark.parametrize(("bits", "symmetric", "dtype"), KINDS)
def test_search_is_never_worse_than_minmax_in_any_group(bits: int, symmetric: bool, dtype: str) -> None:
    weight, importance = normal(12, 40, seed=bits), (3 * normal(1, 40, seed=7)[0]).exp()
    spec = QuantSpec(bits, 16, symmetric, dtype)
    start, found = minmax_grid(weight, spec), search_grid(weight, importance, spec)

    def errors(grid: Grid) -> Tensor:
        return grouped((decode(encode(weight, grid), grid) - weight).square() * importance, 16).sum(-1)

    # Ties of rounding may fall differently in the search and in `encode`: equal errors up to float32 sums.
    assert bool((errors(found) <= errors(start) * (1 + 1e-5)).all())
    if bits <= 4:  # at eight bits the min-max grid may be the best there is
        assert weighted_error(weight, found, importance) < 0.9 * weighted_error(weight, start, importance)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_ends_where_neither_a_refit_nor_another_zero_point_helps(bits: int) -> None:
    weight, importance = normal(128, 96), normal(1, 96, seed=1)[0].exp()
    grid = search_grid(weight, importance, QuantSpec(bits, 32))
    assert grid.zero is not None

    def errors(other: Grid) -> Tensor:
        return grouped((decode(encode(weight, other), other) - weight).square() * importance, 32).sum(-1)

    def improved(other: Grid) -> float:
        return float((errors(other) < 0.99 * errors(grid)).float().mean())

    centred = grouped(decode(encode(weight, grid), grid), 32) / grid.scale.unsqueeze(-1)  # code - zero
    weights, groups = grouped(importance, 32), grouped(weight, 32)
    refit = (weights * groups * centred).sum(-1) / (weights * centred.square()).sum(-1)
    # Four rounds of alternation: one group in fifty may not have settled. Without the refit it is every second one.
    assert improved(replace(grid, scale=refit)) < 0.02
    for step in (-1.0, 1.0):
        moved = (grid.zero + step).clamp_min(0.0).minimum(grid.max_code)
        assert improved(replace(grid, zero=moved)) < 0.005


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_lie_on_a_grid_are_found_exactly(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (6, 32), generator=torch.Generator().manual_seed(bits)).float()
    codes[:, 0], codes[:, 1] = 0, (1 << bits) - 1
    zero = 0.0 if bits == 1 else float(1 << (bits - 1))
    weight = (codes - zero) * 0.125
    grid = search_grid(weight, torch.ones(32), QuantSpec(bits, 16))
    # The second group need not touch both ends of the grid, so its own min-max grid may be finer and not hold it.
    back = decode(encode(weight, grid), grid)
    assert torch.equal(back[:, :16], weight[:, :16])


def test_symmetric_search_gives_the_extra_level_to_the_side_that_matters() -> None:
    # Min-max gives it to the largest weight, 2.0, which hardly counts; the others lie on the grid -1.8, -0.9, 0, 0.9.
    weight, importance = torch.tensor([[2.0, -1.8, -0.9, 0.9]]), torch.tensor([1e-3, 1.0, 1.0, 1.0])
    spec = QuantSpec(2, -1, symmetric=True)
    assert minmax_grid(weight, spec).scale[0, 0] == -1.0
    grid = search_grid(weight, importance, spec)
    assert encode(weight, grid).tolist() == [[3, 0, 1, 3]]
    # The refit is pulled by the light weight a little: 0.9 * (1 + 1.1 / 0.9 * 1e-3 / 6).
    assert abs(float(grid.scale[0, 0]) - 0.9) < 1e-3


def test_a_group_without_importance_counts_its_channels_alike() -> None:
    weight = normal(4, 8)
    importance = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0])
    grid = search_grid(weight, importance, QuantSpec(2, 4))
    alike = search_grid(weight, torch.ones(8), QuantSpec(2, 4))
    assert torch.equal(grid.scale[:, 0], alike.scale[:, 0])
    assert torch.equal(grid.shift[:, 0], alike.shift[:, 0])
    assert bool(torch.isfinite(grid.scale).all())


def test_normalised_importances_have_mean_one_over_the_true_channels() -> None:
    importance = torch.tensor([[1.0, 3.0], [5.0, 9.0], [0.0, 0.0]])
    valid = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert normalised(importance, valid).tolist() == [[0.5, 1.5], [1.0, 0.0], [1.0, 1.0]]


def test_the_scale_of_importances_is_irrelevant() -> None:
    weight, importance = normal(4, 24), normal(1, 24, seed=3)[0].square()
    for bits in (1, 2, 4):
        spec = QuantSpec(bits, 8)
        # A power of two, so that the normalised importances are the same numbers.
        assert same_grid(search_grid(weight, importance, spec), search_grid(weight, importance * 2.0**40, spec))


# --- mixed widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_bits_per_group_give_each_group_the_grid_of_its_width(symmetric: bool) -> None:
    weight, importance = normal(5, 48), normal(1, 48, seed=5)[0].square()
    widths = torch.tensor([2, 3, 4])
    for weights in (None, importance):
        mixed = search_grid(weight, weights, QuantSpec(3, 16, symmetric), widths)
        for group, bits in enumerate(widths.tolist()):
            columns = slice(16 * group, 16 * group + 16)
            part = None if weights is None else weights[columns]
            own = search_grid(weight[:, columns], part, QuantSpec(bits, 16, symmetric))
            assert torch.equal(mixed.scale[:, group], own.scale[:, 0])
            assert torch.equal(mixed.shift[:, group], own.shift[:, 0])


def test_a_one_bit_group_among_others_has_an_offset_and_they_keep_their_zero_points() -> None:
    weight = normal(5, 48)
    grid = minmax_grid(weight, QuantSpec(2, 16), torch.tensor([1, 2, 3]))
    one, two = minmax_grid(weight[:, :16], QuantSpec(1, 16)), minmax_grid(weight[:, 16:32], QuantSpec(2, 16))
    assert grid.zero is not None
    assert grid.offset is not None
    assert torch.equal(grid.scale[:, 0], one.scale[:, 0])
    assert torch.equal(grid.shift[:, 0], one.shift[:, 0])
    assert torch.equal(grid.scale[:, 1], two.scale[:, 0])
    assert torch.equal(grid.shift[:, 1], two.shift[:, 0])

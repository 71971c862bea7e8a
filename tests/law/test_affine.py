"""Laws of rounding and of the grids it rounds onto."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode, pack
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.solvers.ranges import grouped, search_grid

LAW = settings(max_examples=50, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**16)
SPECS = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([-1, 1, 3, 8, 16]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
)


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.randn(1, columns, generator=generator).exp()
    weight[:, torch.randint(0, columns, (1,), generator=generator)] *= 10  # an outlier channel
    return weight


def importances(columns: int, seed: int) -> Tensor:
    """Positive over several decades, some zero."""
    generator = torch.Generator().manual_seed(seed + 1)
    values = (3 * torch.randn(columns, generator=generator)).exp()
    return values * (torch.rand(columns, generator=generator) > 0.1)


def maybe(search: bool, columns: int, seed: int) -> Tensor | None:
    return importances(columns, seed) if search else None


@LAW
@given(SPECS, st.integers(1, 12), st.integers(1, 40), SEEDS, st.booleans())
def test_nearest_code_is_the_nearest(spec: QuantSpec, rows: int, columns: int, seed: int, search: bool) -> None:
    weight = heavy_tailed(rows, columns, seed)
    grid = search_grid(weight, maybe(search, columns, seed), spec)
    codes = encode(weight, grid)
    error = (decode(codes, grid) - weight).abs()
    for step in (-1, 1):
        other = codes.int() + step
        allowed = (other >= 0) & (other < 1 << spec.bits)
        neighbour = (decode(other.clamp(0, 255).to(torch.uint8), grid) - weight).abs()
        # At a tie both are nearest; their float32 errors then differ by rounding of numbers of the weight's size.
        assert bool((error <= neighbour + 1e-6 * weight.abs().max())[allowed].all())


@LAW
@given(SPECS, st.integers(1, 12), st.integers(1, 40), SEEDS, st.booleans())
def test_rounding_twice_is_rounding_once(spec: QuantSpec, rows: int, columns: int, seed: int, search: bool) -> None:
    weight = heavy_tailed(rows, columns, seed)
    grid = search_grid(weight, maybe(search, columns, seed), spec)
    rounded = decode(encode(weight, grid), grid)
    # Of the weights: a one-bit group that holds one value has two codes for it when its offset absorbs its scale.
    assert torch.equal(decode(encode(rounded, grid), grid), rounded)


@LAW
@given(SPECS, st.integers(1, 20), st.integers(1, 50), SEEDS, st.booleans())
def test_packing_changes_no_weight(spec: QuantSpec, rows: int, columns: int, seed: int, search: bool) -> None:
    weight = heavy_tailed(rows, columns, seed)
    grid = search_grid(weight, maybe(search, columns, seed), spec)
    codes = encode(weight, grid)
    assert torch.equal(dequantize(pack(codes, grid)), decode(codes, grid))


@LAW
@given(SPECS, st.integers(1, 20), st.integers(1, 50), SEEDS, st.booleans(), st.lists(st.sampled_from(BITS), min_size=1))
def test_packing_mixed_widths_changes_no_weight(
    spec: QuantSpec, rows: int, columns: int, seed: int, search: bool, widths: list[int]
) -> None:
    groups = -(-columns // spec.columns_per_group(columns))
    mixed = replace(spec, widths=tuple(widths[k % len(widths)] for k in range(groups)))
    weight = heavy_tailed(rows, columns, seed)
    grid = search_grid(weight, maybe(search, columns, seed), mixed)
    codes = encode(weight, grid)
    packed = pack(codes, grid)
    assert torch.equal(dequantize(packed), decode(codes, grid))
    assert [segment.bits for segment in packed.segments] == sorted(set(mixed.widths))
    assert sum(segment.groups for segment in packed.segments) == groups


@LAW
@given(SPECS, st.integers(1, 12), st.integers(1, 40), SEEDS)
def test_search_is_never_worse_than_minmax(spec: QuantSpec, rows: int, columns: int, seed: int) -> None:
    weight, importance = heavy_tailed(rows, columns, seed), importances(columns, seed)

    def errors(grid: Grid) -> Tensor:
        per_weight = (decode(encode(weight, grid), grid) - weight).square() * importance
        return grouped(per_weight, spec.columns_per_group(columns)).sum(-1)

    before, after = errors(search_grid(weight, None, spec)), errors(search_grid(weight, importance, spec))
    # Relative: float32 sums of the search. Absolute: errors at the level of float32 noise in the weights themselves.
    noise = 1e-12 * (weight.square() * importance).sum()
    # Groups without importance are fitted with all channels alike; their weighted error is zero either way.
    assert bool((after <= before * (1 + 1e-5) + noise).all())


@LAW
@given(SPECS, st.integers(1, 12), st.integers(1, 40), SEEDS, st.booleans(), st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_the_weights_by_a_power_of_two_scales_the_grid(
    spec: QuantSpec, rows: int, columns: int, seed: int, search: bool, factor: float
) -> None:
    weight = heavy_tailed(rows, columns, seed)
    # Scaling is exact in bfloat16. In float16 it is not for subnormal scales and offsets, which groups of one small
    # weight, or of eight bits, may have.
    spec = replace(spec, scale_dtype="bfloat16")
    importance = maybe(search, columns, seed)
    grid, scaled = search_grid(weight, importance, spec), search_grid(weight * factor, importance, spec)
    codes = encode(weight, grid)
    assert torch.equal(encode(weight * factor, scaled), codes)
    # Not the scales themselves: those of a group that holds one value, or only zeros, are arbitrary.
    assert torch.equal(decode(codes, scaled), decode(codes, grid) * factor)


@LAW
@given(SPECS, st.integers(1, 8), st.integers(1, 40), SEEDS, st.booleans())
def test_permuting_rows_permutes_the_grid(spec: QuantSpec, rows: int, columns: int, seed: int, search: bool) -> None:
    weight, importance = heavy_tailed(rows, columns, seed), maybe(search, columns, seed)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    grid, permuted = search_grid(weight, importance, spec), search_grid(weight[order], importance, spec)
    assert torch.equal(permuted.scale, grid.scale[order])
    assert torch.equal(permuted.shift, grid.shift[order])


@LAW
@given(SPECS, st.integers(1, 8), st.integers(2, 40), SEEDS)
def test_permuting_the_columns_of_a_group_keeps_the_minmax_grid(
    spec: QuantSpec, rows: int, columns: int, seed: int
) -> None:
    weight = heavy_tailed(rows, columns, seed)
    size = spec.columns_per_group(columns)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [start + torch.randperm(min(size, columns - start), generator=generator) for start in range(0, columns, size)]
    )
    grid, permuted = search_grid(weight, None, spec), search_grid(weight[:, order], None, spec)
    if spec.bits > 1:  # extremes do not depend on order; one-bit means are sums, equal up to float32 rounding
        assert torch.equal(permuted.scale, grid.scale)
        assert torch.equal(permuted.shift, grid.shift)
    else:
        ulp = 2**-10 if spec.scale_dtype == "float16" else 2**-7  # that rounding may cross one step of the stored type
        torch.testing.assert_close(permuted.scale, grid.scale, rtol=ulp, atol=1e-6)
        torch.testing.assert_close(permuted.shift, grid.shift, rtol=ulp, atol=1e-6)

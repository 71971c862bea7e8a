"""Levels in pairs around zero: where they lie, that they pay on symmetric weights, stored without any zero-point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode, pack
from bitfloor.core.errors import InputError
from bitfloor.core.packed import bits_per_weight, dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.bitfloor import codes_and_grids
from bitfloor.ops import search_reference
from bitfloor.solvers.adamw import AdamW
from bitfloor.solvers.descent import descend
from bitfloor.solvers.gptq import GridSearch, gptq
from bitfloor.solvers.ranges import minmax_grid, search_grid
from bitfloor.solvers.refine import Refinement
from bitfloor.solvers.scales import TunedScales


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, grid: Grid) -> float:
    return float((decode(encode(weight, grid), grid) - weight).square().mean())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_lie_in_pairs(bits: int) -> None:
    weight = normal(3, 16, seed=bits)
    grid = minmax_grid(weight, QuantSpec(bits, -1, centred=8))
    every = torch.arange(1 << bits, dtype=torch.uint8).expand(3, -1)
    levels = decode(every, grid)
    torch.testing.assert_close(levels, -levels.flip(1), rtol=0, atol=0)
    reach = weight.abs().mean(1) if bits == 1 else weight.abs().amax(1)
    torch.testing.assert_close(levels[:, -1], reach, rtol=1e-3, atol=0)


def test_two_bits_of_a_normal_row_come_to_the_best_there_is() -> None:
    """The optimal uniform quantizer of a normal variable leaves 0.3634 of it at 2 levels, 0.11885 at 4 (Max, 1960)."""
    weight = normal(64, 8192)
    for bits, best in ((1, 0.3634), (2, 0.11885)):
        found = error(weight, search_grid(weight, torch.ones(8192), QuantSpec(bits, -1, centred=2)))
        assert best * 0.99 < found < best * 1.01
    whole = error(weight, search_grid(weight, torch.ones(8192), QuantSpec(2, -1)))
    assert whole > 1.15 * 0.11885


def test_only_so_wide_groups_are_centred() -> None:
    weight = normal(8, 64)
    spec = QuantSpec(2, 16, centred=2, widths=(1, 2, 3, 4))
    grid = search_grid(weight, torch.ones(64), spec)
    assert grid.zero is not None and grid.offset is None
    assert grid.zero[:, 0].unique().tolist() == [0.5] and grid.zero[:, 1].unique().tolist() == [1.5]
    assert bool((grid.zero[:, 2:] == grid.zero[:, 2:].round()).all())
    alone = search_grid(weight[:, 32:], torch.ones(32), QuantSpec(3, 16, widths=(3, 4)))
    assert torch.equal(grid.scale[:, 2:], alone.scale) and alone.zero is not None
    assert torch.equal(grid.zero[:, 2:], alone.zero)


@pytest.mark.parametrize("widths", [(1, 2, 3, 4), (2, 2, 2, 2), (1, 1, 1, 1), (3, 1, 2, 8)])
def test_what_is_packed_is_what_was_meant(widths: tuple[int, ...]) -> None:
    weight = normal(20, 60)
    grid = search_grid(weight, torch.ones(60), QuantSpec(2, 16, centred=2, widths=widths))
    codes = encode(weight, grid)
    packed = pack(codes, grid)
    assert torch.equal(dequantize(packed), decode(codes, grid))
    for segment, (own, back) in zip(packed.segments, codes_and_grids(packed, QuantSpec(2, 16, centred=2)), strict=True):
        assert segment.offset is None and isinstance(segment.zero, Tensor) == (segment.bits > 2)
        assert segment.bits > 2 or segment.zero == (2**segment.bits - 1) / 2
        assert torch.equal(pack(own, back).segments[0].codes, segment.codes)


def test_nothing_but_the_scale_is_stored() -> None:
    weight = normal(32, 128)
    sizes = {c: bits_per_weight(pack(*_rounded(weight, QuantSpec(2, 64, centred=c)))) for c in (0, 2)}
    assert sizes == {0: 2 + 18 / 64, 2: 2 + 16 / 64}
    one = {c: bits_per_weight(pack(*_rounded(weight, QuantSpec(1, 64, centred=c)))) for c in (0, 2)}
    assert one == {0: 1 + 32 / 64, 2: 1 + 16 / 64}


def _rounded(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Grid]:
    grid = search_grid(weight, torch.ones(weight.shape[1]), spec)
    return encode(weight, grid), grid


@pytest.mark.parametrize("bits", [1, 2])
def test_gptq_and_descent_keep_the_centre_and_lower_the_error(bits: int) -> None:
    weight, x = normal(24, 64), normal(300, 64, seed=1) @ (torch.eye(64) + 0.1 * normal(64, 64, seed=2))
    hessian, spec = x.T @ x, QuantSpec(bits, 32, centred=2)

    def loss(codes: Tensor, grid: Grid) -> float:
        return float((x @ (decode(codes, grid) - weight).T).square().sum())

    found = gptq(weight, hessian, GridSearch(32, lambda k, w, c: search_grid(w, torch.ones(len(c)), spec)))
    codes, grid = descend(weight, found.codes, found.grid, hessian, damping=0.01, sweeps=4)
    assert grid.zero is not None and grid.zero.unique().tolist() == [(2**bits - 1) / 2]
    assert loss(codes, grid) < loss(found.codes, found.grid) < loss(*_rounded(weight, spec))
    assert not torch.equal(grid.scale, found.grid.scale)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("adam", [False, True], ids=["sign", "adamw"])
def test_learning_starts_where_it_was_and_keeps_the_centre(bits: int, adam: bool) -> None:
    weight = normal(16, 48)
    codes, grid = _rounded(weight, QuantSpec(bits, 16, centred=2))
    learnt = Refinement(weight, codes, grid, zero_share=50.0, adam=AdamW() if adam else None)
    assert torch.equal(learnt.fake_quantized(), decode(codes, grid))
    target = normal(16, 48, seed=5)
    before = float((learnt.fake_quantized() - target).square().sum())
    for step in range(60):
        learnt.step(learnt.fake_quantized() - target, 0.02 * (1 - step / 60), 0.01 * (1 - step / 60))
    found_codes, found = learnt.snapshot()
    assert found.zero is not None and found.zero.unique().tolist() == [(2**bits - 1) / 2]
    assert torch.equal(dequantize(pack(found_codes, found)), decode(found_codes, found))
    assert float((decode(found_codes, found) - target).square().sum()) < 0.8 * before


@pytest.mark.parametrize("widths", [(1, 2), (3, 8)])
def test_scales_are_tuned_by_exact_gradients(widths: tuple[int, ...]) -> None:
    weight = normal(5, 32)
    packed = pack(*_rounded(weight, QuantSpec(2, 16, centred=8, widths=widths)))
    scales = TunedScales(packed)
    assert torch.equal(scales.dense(), dequantize(packed))
    flow = normal(5, 32, seed=9)
    found = scales.gradient(flow)
    for group in range(2):
        own = flow[:, 16 * group : 16 * group + 16] * dequantize(packed)[:, 16 * group : 16 * group + 16]
        torch.testing.assert_close(found[:, group], own.sum(1), rtol=1e-5, atol=1e-5)


def test_whole_zero_points_are_searched_as_before() -> None:
    """The fraction that is added before rounding is zero for them: the same numbers as without it."""
    weight, scale = normal(4, 32), torch.full((4, 2), 0.31)
    for zero in (torch.full((4, 2), 1.0), torch.full((4, 2), 1.5)):
        above, below = search_reference.fit_sums(weight, torch.ones(32), torch.full((2,), 3.0), scale, zero, 16)
        codes = (weight / 0.31 + zero.repeat_interleave(16, 1)).round().clamp(0, 3) - zero.repeat_interleave(16, 1)
        torch.testing.assert_close(above, (weight * codes).view(4, 2, 16).sum(-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(below, codes.square().view(4, 2, 16).sum(-1), rtol=1e-5, atol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="cannot be symmetric and centred"):
        QuantSpec(2, 64, symmetric=True, centred=2)
    with pytest.raises(InputError, match="centred = 7 is no width"):
        QuantSpec(2, 64, centred=7)

"""Rounding learned from a start: the start itself, the gradients, and what the latent weight remembers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode, stored_scale
from bitfloor.core.packed import expand_groups
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.adamw import AdamW
from bitfloor.solvers.ranges import minmax_grid, search_grid
from bitfloor.solvers.refine import MARGIN, Refinement, latent

SPECS = [QuantSpec(2, 16), QuantSpec(3, 7, True), QuantSpec(4, -1, False, "bfloat16"), QuantSpec(8, 16, True)]


def weights(rows: int = 12, columns: int = 40, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, :16] = 0.0
    return weight


def start(spec: QuantSpec, seed: int = 1) -> tuple[Tensor, Tensor, Grid]:
    """A weight, a grid, and codes of which a third are a step or two away from the nearest."""
    weight = weights()
    grid = search_grid(weight, torch.ones(weight.shape[1]), spec)
    generator = torch.Generator().manual_seed(seed)
    moved = torch.randint(-3, 4, weight.shape, generator=generator).clamp(-2, 2) // 2
    codes = (encode(weight, grid).float() + moved).clamp(0, 2**spec.bits - 1)
    return weight, codes.to(torch.uint8), grid


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_starts_where_it_was_told_bit_for_bit(spec: QuantSpec) -> None:
    weight, codes, grid = start(spec)
    refined = Refinement(weight, codes, grid)
    found, own = refined.snapshot()
    assert torch.equal(found, codes)
    assert torch.equal(own.scale, grid.scale) and torch.equal(own.shift, grid.shift)
    assert own.constant_zero is grid.constant_zero and own.scale_dtype is grid.scale_dtype
    assert torch.equal(refined.fake_quantized(), decode(codes, grid))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_trained_is_what_is_stored(spec: QuantSpec) -> None:
    refined = Refinement(*start(spec))
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        refined.step(torch.randn(refined.weight.shape, generator=generator), 0.2, 0.05)
    codes, grid = refined.snapshot()
    assert torch.equal(refined.fake_quantized(), decode(codes, grid))
    assert torch.equal(grid.scale, grid.scale.to(grid.scale_dtype).float())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_latent_weight_is_the_weight_wherever_the_code_is_nearest(spec: QuantSpec) -> None:
    weight, codes, grid = start(spec)
    scale, shift, _ = grid.columns(weight.shape[1])
    at, exact = (
        (latent(weight, codes, grid.scale, grid.zero, grid.group_size) - shift) / scale,
        (weight - shift) / scale,
    )
    distance = exact - codes.float()
    inner = distance.abs() < MARGIN - 1e-3
    torch.testing.assert_close(at[inner], exact[inner], rtol=0, atol=1e-4)  # a few float32 roundings of codes up to 255
    beyond = distance.abs() > MARGIN + 1e-3
    torch.testing.assert_close((at - codes)[beyond], MARGIN * torch.sign(distance)[beyond], rtol=0, atol=1e-4)
    assert bool(beyond.any()) and bool(inner.any())


def test_signs_of_the_factors_equal_those_of_automatic_differentiation() -> None:
    """With the rounding's gradient set to one and the clamp's to zero outside."""
    for spec in SPECS:
        refined = Refinement(*start(spec))
        grad = torch.randn(refined.weight.shape, generator=torch.Generator().manual_seed(4))
        factor = torch.ones_like(refined.factor, requires_grad=True)
        grid = refined.start
        assert grid.zero is not None
        size, columns = grid.group_size, refined.weight.shape[1]
        scale = (grid.scale * factor).repeat_interleave(size, 1)[:, :columns]
        zero = grid.zero.repeat_interleave(size, 1)[:, :columns]
        exact = refined.weight / scale + zero
        rounded = exact + (torch.round(exact) - exact).detach()
        ((rounded.clamp(0, 2**spec.bits - 1) - zero) * scale * grad).sum().backward()
        assert factor.grad is not None
        refined.step(grad, 0.0, 0.25)
        sure = factor.grad.abs() > 1e-4 * factor.grad.abs().max()  # sums near zero depend on the order of additions
        assert torch.equal((1.0 - refined.factor)[sure], 0.25 * torch.sign(factor.grad)[sure])


def test_a_code_that_was_moved_goes_back_first() -> None:
    weight = torch.full((1, 4), 0.3)
    grid = Grid(torch.ones(1, 1), torch.ones(1, 1), None, torch.tensor([2]), 4)
    codes = torch.tensor([[1, 2, 1, 1]], dtype=torch.uint8)  # nearest to 0.3 + 1 is 1
    refined = Refinement(weight, codes, grid, tune_scale=False)
    refined.step(torch.ones(1, 4), 0.02, 0.0)  # a smaller weight is wanted
    assert refined.snapshot()[0].tolist() == [[1, 1, 1, 1]]
    refined = Refinement(weight, codes, grid, tune_scale=False)
    refined.step(-torch.ones(1, 4), 0.1, 0.0)
    assert refined.snapshot()[0].tolist() == [[1, 2, 1, 1]]
    refined.step(-torch.ones(1, 4), 0.2, 0.0)
    assert refined.snapshot()[0].tolist() == [[2, 2, 2, 2]]


def test_without_scales_only_the_rounding_moves() -> None:
    refined = Refinement(*start(SPECS[0]), tune_scale=False)
    refined.step(torch.ones_like(refined.weight), 0.3, 0.3)
    assert bool((refined.factor == 1).all()) and bool((refined.shift != 0).any())


def test_offsets_beyond_one_bit_and_mixed_widths_are_refused() -> None:
    weight = weights()
    grid = minmax_grid(weight, QuantSpec(2, 16))
    codes = encode(weight, grid)
    offset = Grid(grid.scale, None, grid.shift, grid.bits, 16)
    mixed = Grid(grid.scale, grid.zero, None, torch.tensor([2, 3, 2]), 16)
    for wrong in (offset, mixed):
        with pytest.raises(ValueError, match="needs a grid of one width, with zero-points"):
            Refinement(weight, codes, wrong)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.symmetric], ids=str)
def test_zero_points_move_by_the_gradient_of_what_is_clamped(spec: QuantSpec) -> None:
    weight, codes, grid = start(spec)
    refined = Refinement(weight, codes, grid, zero_share=1.0)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(weight.shape, generator=generator)
    refined.shift.copy_(2.0 * torch.randn(weight.shape, generator=generator))  # at the start nothing is clamped
    assert grid.zero is not None
    # By automatic differentiation, with the rounding's gradient set to one and the clamp's to zero outside.
    zero = grid.zero.clone().requires_grad_()
    scale, wide = (expand_groups(part, grid.group_size, weight.shape[1]) for part in (grid.scale, zero))
    exact = refined.weight / scale + wide + refined.shift
    rounded = exact + (torch.round(exact) - exact).detach()
    torch.autograd.backward((rounded.clamp(0, 2**spec.bits - 1) - wide) * scale, grad)
    assert zero.grad is not None
    refined.step(grad, 0.75, 0.0)
    moved = torch.sign(zero.grad) * (zero.grad.abs() > 1e-5)
    expected = torch.round(grid.zero - 0.75 * moved).clamp(0, 2**spec.bits - 1)
    sure = (zero.grad.abs() > 1e-4) | (zero.grad == 0)
    found = refined.grid().zero
    assert found is not None
    assert torch.equal(found[sure], expected[sure])
    assert bool((found != grid.zero).any())
    stored, own = refined.snapshot()
    assert torch.equal(refined.fake_quantized(), decode(stored, own))


def test_zero_points_of_symmetric_grids_stay() -> None:
    refined = Refinement(*start(QuantSpec(3, 7, True)), zero_share=1.0)
    before = refined.grid().zero
    refined.step(torch.randn(12, 40, generator=torch.Generator().manual_seed(5)), 1.0, 0.1)
    assert before is not None and torch.equal(before, refined.grid().zero)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_adamw_moves_as_torchs_does_on_the_gradients_of_the_documented_form(spec: QuantSpec) -> None:
    weight, codes, grid = start(spec)
    refined = Refinement(weight, codes, grid, adam=AdamW())
    shift = torch.zeros_like(weight, requires_grad=True)
    factor = torch.ones_like(grid.scale, requires_grad=True)
    theirs = torch.optim.AdamW(
        [{"params": [shift], "lr": 0.01}, {"params": [factor], "lr": 0.005}], betas=(0.9, 0.95), weight_decay=0.0
    )
    generator = torch.Generator().manual_seed(6)
    top = 2**spec.bits - 1
    for _ in range(3):
        grad = torch.randn(weight.shape, generator=generator)
        assert grid.zero is not None
        scale = expand_groups(stored_scale(grid.scale * factor.detach(), grid.scale_dtype), grid.group_size, 40)
        slack = expand_groups(grid.scale * (factor - factor.detach()), grid.group_size, 40)
        wide, zero = scale + slack, expand_groups(grid.zero, grid.group_size, 40)
        exact = refined.weight / wide + zero + shift
        rounded = exact + (torch.round(exact) - exact).detach()
        theirs.zero_grad()
        torch.autograd.backward((rounded.clamp(0, top) - zero) * wide, grad)
        theirs.step()
        refined.step(grad, 0.01, 0.005)
    for ours, other in ((refined.shift, shift), (refined.factor, factor)):
        near = (ours - other.detach()).abs() < 1e-3
        assert float(near.float().mean()) > 0.98  # a gradient near zero has either sign, and AdamW knows no size


def test_one_bit_groups_learn_levels_and_store_offsets() -> None:
    """Autograd through ``(q - z) s`` with ``o = -z s`` gives what the steps follow."""
    weight = torch.randn(6, 44, generator=torch.Generator().manual_seed(3))
    aim = 0.5 * weight + 0.1
    grid = minmax_grid(weight, QuantSpec(1, 16))
    codes = encode(weight, grid)
    refined = Refinement(weight, codes, grid)
    assert torch.equal(refined.snapshot()[0], codes)
    start, first = refined.grid(), grid.offset
    assert start.zero is None and start.offset is not None and first is not None
    assert torch.equal(start.scale, grid.scale) and torch.equal(start.offset, first)
    torch.testing.assert_close(refined.fake_quantized(), decode(codes, grid), rtol=0, atol=1e-6)
    for _ in range(40):  # towards a matrix with half the spread and another mean
        refined.step(refined.fake_quantized() - aim, 0.02, 0.02)
    found, levels = refined.snapshot()
    assert levels.offset is not None and torch.equal(levels.offset, levels.offset.half().float())
    before = (decode(codes, grid) - aim).square().sum()
    assert float((decode(found, levels) - aim).square().sum()) < 0.6 * float(before)

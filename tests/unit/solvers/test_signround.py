"""SignRound's closed forms against automatic differentiation, and its start against round-to-nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import decode, encode
from bitfloor.core.spec import QuantSpec
from bitfloor.ops.rounding_reference import CHUNK
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.signround import SignRound

SPECS = [
    QuantSpec(bits, size, symmetric, dtype)
    for bits, size, symmetric, dtype in [
        *itertools.product((2, 3, 4, 8), (16,), (True, False), ("float16",)),
        (2, 7, True, "bfloat16"),
        (3, 7, False, "bfloat16"),
        (4, -1, False, "float16"),
    ]
]


def weights(rows: int = 12, columns: int = 40, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, :16] = 0.0  # a group of zeros
    weight[1, :16] = weight[1, :16].abs()  # one side only
    weight[2, :16] = -weight[2, :16].abs()
    return weight


def shaken(spec: QuantSpec, seed: int = 1, spread: float = 0.4) -> SignRound:
    """Parameters away from their start."""
    generator = torch.Generator().manual_seed(seed)
    learnt = SignRound(weights(), spec)
    learnt.shift.copy_((torch.rand(learnt.shift.shape, generator=generator) - 0.5) * 2 * spread)
    learnt.low.copy_(1 - 0.5 * torch.rand(learnt.low.shape, generator=generator))
    learnt.high.copy_(1 - 0.5 * torch.rand(learnt.high.shape, generator=generator))
    return learnt


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_start_is_round_to_nearest_bit_for_bit(spec: QuantSpec) -> None:
    weight = weights()
    learnt, grid = SignRound(weight, spec), minmax_grid(weight, spec)
    assert torch.equal(learnt.grid().scale, grid.scale) and torch.equal(learnt.grid().shift, grid.shift)
    assert torch.equal(learnt.codes(), encode(weight, grid))
    assert learnt.grid().constant_zero is spec.symmetric


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_trained_is_what_is_stored(spec: QuantSpec) -> None:
    learnt = shaken(spec)
    codes, grid = learnt.snapshot()
    assert torch.equal(learnt.fake_quantized(), decode(codes, grid))
    assert not torch.equal(codes, encode(learnt.weight, minmax_grid(learnt.weight, spec)))


class Through(torch.autograd.Function):
    """``new`` in the value, ``old`` in the gradient."""

    @staticmethod
    def forward(ctx: object, old: Tensor, new: Tensor) -> Tensor:
        return new.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def by_autograd(learnt: SignRound, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``V``, ``alpha``, ``beta`` from the formulas of the paper as a graph."""
    spec, size, weight = learnt.spec, learnt.size, learnt.weight
    shift, low, high = (part.clone().requires_grad_() for part in (learnt.shift, learnt.low, learnt.high))
    groups = [list(range(at, min(at + size, weight.shape[1]))) for at in range(0, weight.shape[1], size)]
    total = torch.zeros(())
    for g, at in enumerate(groups):
        part = weight[:, at]
        below = -low[:, g] * part.amin(1).clamp_max(0)
        above = high[:, g] * part.amax(1).clamp_min(0)
        dtype = getattr(torch, spec.scale_dtype)
        if spec.symmetric:
            half = 1 << (spec.bits - 1)
            sign = torch.where(below > above, 1.0, -1.0)
            largest = torch.maximum(below, above)
            scale = torch.where(largest == 0, torch.ones_like(largest), sign * largest) / half
            bottom, top, zero = -half, half - 1, torch.zeros_like(scale)
        else:
            bottom, top = 0, (1 << spec.bits) - 1
            span = above + below
            scale = torch.where(span == 0, torch.ones_like(span), span / top)
        scale = Through.apply(scale, scale.to(dtype).float())
        if not spec.symmetric:
            ratio = below / scale
            zero = Through.apply(ratio, ratio.round())
        exact = part / scale[:, None] + shift[:, at]
        code = Through.apply(exact, exact.round()) + zero[:, None]
        fake = scale[:, None] * (code.clamp(bottom, top) - zero[:, None])
        total = total + (fake * grad[:, at]).sum()
    found = torch.autograd.grad(total, (shift, low, high), allow_unused=True)
    return found[0], found[1], found[2]


@pytest.mark.parametrize("spread", [0.4, 1.5])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_signs_equal_those_of_automatic_differentiation(spec: QuantSpec, spread: float) -> None:
    learnt = shaken(spec, spread=spread)
    grad = torch.randn(learnt.weight.shape, generator=torch.Generator().manual_seed(2))
    exact = by_autograd(learnt, grad)
    before = [part.clone() for part in (learnt.shift, learnt.low, learnt.high)]
    learnt.step(grad, 0.01, 0.001)
    rates = (0.01, 0.001, 0.001)
    for old, new, gradient, rate in zip(before, (learnt.shift, learnt.low, learnt.high), exact, rates, strict=True):
        # Where the sums cancel to nothing the sign is that of rounding errors; and a group of zeros has no range.
        clear = (gradient.abs() > 1e-4 * gradient.abs().max()) | (gradient == 0)
        expected = old - rate * gradient.sign()
        expected = expected if old is before[0] else expected.clamp(0.0, 1.0)
        assert torch.allclose(new[clear], expected[clear], rtol=0, atol=1e-6)
        assert float(clear.float().mean()) > 0.97 and bool((gradient != 0).any())


def test_ranges_stay_between_nothing_and_all() -> None:
    learnt = SignRound(weights(), QuantSpec(2, 16))
    grad = torch.randn(learnt.weight.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(40):
        learnt.step(grad, 0.0, 0.1)
        assert bool(((learnt.low >= 0) & (learnt.low <= 1) & (learnt.high >= 0) & (learnt.high <= 1)).all())
        assert bool(torch.isfinite(learnt.fake_quantized()).all())
    assert float(torch.minimum(learnt.low, learnt.high).min()) == 0.0


def test_without_ranges_only_the_rounding_moves() -> None:
    learnt = SignRound(weights(), QuantSpec(3, 16), tune_range=False)
    learnt.step(torch.randn(learnt.weight.shape), 0.1, 0.1)
    assert bool((learnt.low == 1).all() and (learnt.high == 1).all()) and bool(learnt.shift.any())


@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_lowers_the_loss_of_a_layer(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 48, generator=generator)
    low_rank = torch.randn(48, 8, generator=generator) @ torch.randn(8, 48, generator=generator)
    x = torch.randn(512, 48, generator=generator) @ (low_rank + torch.eye(48))  # as activations are
    learnt, target = SignRound(weight, QuantSpec(2, 16, symmetric)), x @ weight.T
    losses = []
    for t in range(200):
        fake = learnt.fake_quantized().requires_grad_()
        loss = (x @ fake.T - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        learnt.step(fake.grad, (1 - t / 200) / 200, (1 - t / 200) / 200)
    assert min(losses) < 0.8 * losses[0] and losses[-1] < 0.9 * losses[0]


def test_rows_in_chunks_are_the_rows_alone() -> None:
    columns = CHUNK // 4  # four rows a chunk
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(5))
    grad = torch.randn(6, columns, generator=torch.Generator().manual_seed(6))
    whole = SignRound(weight, QuantSpec(2, 64))
    whole.step(grad, 0.3, 0.2)
    for row in (0, 3, 4, 5):
        alone = SignRound(weight[row : row + 1], QuantSpec(2, 64))
        alone.step(grad[row : row + 1], 0.3, 0.2)
        assert torch.equal(whole.codes()[row : row + 1], alone.codes())


def test_one_bit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 bits"):
        SignRound(weights(), QuantSpec(1, 16))

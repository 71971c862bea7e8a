"""Learnable clipping: its gradients against automatic differentiation, its start, and what is stored of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import decode, encode, pack
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.ops.rounding_reference import CHUNK
from bitfloor.solvers.clipping import Clipping, Spread
from bitfloor.solvers.ranges import minmax_grid

SPECS = [
    QuantSpec(bits, size, symmetric, dtype)
    for bits, size, symmetric, dtype in [
        *itertools.product((2, 3, 4, 8), (16,), (True, False), ("float16",)),
        (2, 7, True, "bfloat16"),
        (3, 7, False, "bfloat16"),
        (4, -1, False, "float16"),
        (1, 16, False, "float16"),
        (1, 7, False, "bfloat16"),
        (1, -1, True, "float16"),
    ]
]


def weights(rows: int = 12, columns: int = 40, seed: int = 0) -> Tensor:
    """Groups of 16, the last one short; the first groups of the first rows are no pleasure."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0, :16] = 0.0
    weight[1, :16] = weight[1, :16].abs()
    weight[2, :16] = -weight[2, :16].abs()
    weight[3, :16] = 0.7  # nothing but one number, on either side of zero
    weight[4, :16] = -0.7
    return weight


def make(weight: Tensor, spec: QuantSpec) -> Clipping | Spread:
    return Clipping(weight, spec) if spec.bits > 1 else Spread(weight, spec)


def logits(learnt: Clipping | Spread) -> dict[str, Tensor]:
    return {name: getattr(learnt, name) for name in ("low", "high", "factor") if hasattr(learnt, name)}


def shaken(spec: QuantSpec, seed: int = 1) -> Clipping | Spread:
    """Logits away from their start: factors of 0.27 to 0.95 (and 0.5 more at one bit)."""
    learnt, generator = make(weights(), spec), torch.Generator().manual_seed(seed)
    for logit in logits(learnt).values():
        logit.copy_(4.0 * torch.rand(logit.shape, generator=generator) - 1.0)
    return learnt


class Through(torch.autograd.Function):
    """``new`` in the value, ``old`` in the gradient."""

    @staticmethod
    def forward(ctx: object, old: Tensor, new: Tensor) -> Tensor:
        return new.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def clipped(part: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """One group ``[O, g]`` fake-quantized with logits ``[O]``, from the formulas, as a graph."""
    dtype, levels = getattr(torch, spec.scale_dtype), 1 << spec.bits
    below = -torch.sigmoid(low) * part.amin(1).clamp_max(0)
    above = torch.sigmoid(high) * part.amax(1).clamp_min(0)
    if spec.symmetric:
        sign = torch.where(-part.amin(1) > part.amax(1), 1.0, -1.0)
        scale = sign * torch.where(below > above, below, above) / (levels // 2)
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.full_like(scale, levels // 2)
    else:
        scale = (above + below) / (levels - 1)
        scale = torch.where(scale == 0, 1.0, scale)
    scale = Through.apply(scale, scale.to(dtype).float())
    if not spec.symmetric:
        zero = (below / scale).round().clamp(0, levels - 1).detach()
    exact = part / scale[:, None]
    code = (Through.apply(exact, (exact + zero[:, None]).round() - zero[:, None]) + zero[:, None]).clamp(0, levels - 1)
    return (code - zero[:, None]) * scale[:, None]


def spread(part: Tensor, factor: Tensor) -> Tensor:
    """The same of one bit, without the storage type."""
    mean = part.mean(1, keepdim=True)
    distance = (part - mean).abs().mean(1) * (torch.sigmoid(factor) + 0.5)
    return mean + torch.where(part > mean, 1.0, -1.0) * distance[:, None]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_automatic_differentiation(spec: QuantSpec) -> None:
    learnt, weight = shaken(spec), weights()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    own = {name: logit.clone().requires_grad_() for name, logit in logits(learnt).items()}
    before = learnt.fake_quantized()
    made = []
    for g, at in enumerate(range(0, weight.shape[1], learnt.size)):
        part = weight[:, at : at + learnt.size]
        if spec.bits == 1:
            made.append(spread(part, own["factor"][:, g]))
        else:
            made.append(clipped(part, own["low"][:, g], own["high"][:, g], spec))
    fake = torch.cat(made, 1)
    alive = torch.ones(len(weight), dtype=torch.bool)
    if spec.bits == 1:
        alive[3:5] = False  # a spread of rounding errors, whose signs are anything
        precision = torch.finfo(getattr(torch, spec.scale_dtype)).eps
        torch.testing.assert_close(before[alive], fake[alive], rtol=0, atol=8 * precision)
    else:
        # Where the two orders of adding the zero-point tie, a code may differ.
        assert float(((before - fake).abs() < 1e-5).float().mean()) > 0.99
    exact = torch.autograd.grad((fake * grad).sum(), list(own.values()))
    learnt.step(grad, 0.0, 0.01)
    for name, gradient in zip(own, exact, strict=True):
        found = learnt.adam.moments[name][0] / (1 - learnt.adam.betas[0])
        torch.testing.assert_close(found[alive], gradient[alive], rtol=1e-3, atol=1e-4)
        assert bool((gradient[alive] != 0).any()) and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits > 1], ids=str)
def test_the_start_is_the_range_cut_by_a_sigmoid_of_four(spec: QuantSpec) -> None:
    """Both ends by one factor: the min-max grid of the weights times the factor, and the weights rounded to that."""
    learnt, weight = Clipping(weights(), spec), weights()
    cut = minmax_grid(weight * torch.sigmoid(torch.tensor(4.0)), spec)
    codes, grid = learnt.snapshot()
    precision = torch.finfo(getattr(torch, spec.scale_dtype)).eps
    torch.testing.assert_close(grid.scale, cut.scale, rtol=precision, atol=0)  # rounded in another order
    assert grid.zero is not None and cut.zero is not None
    assert float((grid.zero - cut.zero).abs().max()) <= 1 and float((grid.zero != cut.zero).float().mean()) < 0.02
    assert torch.equal(codes, encode(weight, grid)) and grid.constant_zero is spec.symmetric


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits > 1], ids=str)
def test_without_a_cut_it_is_round_to_nearest_bit_for_bit(spec: QuantSpec) -> None:
    learnt, weight = Clipping(weights(), spec), weights()
    for logit in logits(learnt).values():
        logit.fill_(40.0)  # a sigmoid of one
    codes, grid = learnt.snapshot()
    whole = minmax_grid(weight, spec)
    assert torch.equal(grid.scale, whole.scale) and torch.equal(grid.shift, whole.shift)
    assert torch.equal(codes, encode(weight, whole))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.bits == 1], ids=str)
def test_one_bit_starts_at_the_best_spread(spec: QuantSpec) -> None:
    weight, learnt = weights(), Spread(weights(), spec)
    codes, grid = learnt.snapshot()
    best = minmax_grid(weight, spec)
    assert best.offset is not None and grid.offset is not None
    assert torch.equal(grid.scale, best.scale) and torch.equal(grid.offset, best.offset)
    assert torch.equal(codes, encode(weight, best))

    def error(logit: float) -> Tensor:
        learnt.factor.fill_(logit)
        return (learnt.fake_quantized() - weight).square().sum()

    middle = error(0.0)
    assert all(middle < error(logit) for logit in (-0.2, 0.2, 4.0))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_trained_is_what_is_stored(spec: QuantSpec) -> None:
    learnt = shaken(spec)
    codes, grid = learnt.snapshot()
    assert torch.equal(learnt.fake_quantized(), decode(codes, grid))
    assert torch.equal(learnt.fake_quantized(), dequantize(pack(codes, grid)))
    assert int(codes.max()) < 1 << spec.bits
    first = make(weights(), spec).snapshot()[1]
    assert not torch.equal(grid.scale, first.scale)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_ranges_below_the_smallest_scale_stay_on_their_grid(spec: QuantSpec) -> None:
    for size in (1e-6, 1e-7, 3e-8, 1e-9, 1e-36, 1e-42):
        weight = -size * weights().abs()
        learnt = make(weight, spec)
        learnt.step(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)), 0.0, 0.05)
        codes, grid = learnt.snapshot()
        assert torch.equal(learnt.fake_quantized(), dequantize(pack(codes, grid)))
        assert grid.zero is None or 0 <= float(grid.zero.min()) <= float(grid.zero.max()) < 1 << spec.bits


def test_a_step_is_one_of_adamw_without_decay() -> None:
    generator = torch.Generator().manual_seed(7)
    learnt = Clipping(weights(), QuantSpec(2, 16))
    theirs = learnt.high.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.999), weight_decay=0.0)
    for t in range(1, 6):
        before = learnt.adam.moments.get("high", torch.zeros(2, *theirs.shape))[0].clone()
        learnt.step(torch.randn(12, 40, generator=generator), 0.5, 0.01)
        theirs.grad = (learnt.adam.moments["high"][0] - 0.9 * before) / 0.1  # the gradient of this step
        optimizer.step()
        assert learnt.steps == t
    torch.testing.assert_close(learnt.high, theirs.detach(), rtol=0, atol=1e-5)
    assert float((learnt.high - 4.0).abs().max()) > 0.02


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_of_zeros_and_of_one_number_stay_what_they_are(spec: QuantSpec) -> None:
    if spec.group_size != 16:
        return
    learnt, weight = make(weights(), spec), weights()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    for _ in range(20):
        learnt.step(grad, 0.0, 0.05)
        fake = learnt.fake_quantized()
        assert bool(torch.isfinite(fake).all())
        assert not bool(fake[0, :16].any())
    for row in (3, 4):
        assert len(fake[row, :16].unique()) == 1
        if spec.bits == 1:  # the mean is kept
            torch.testing.assert_close(fake[row, :16], weight[row, :16], rtol=1e-3, atol=0)
    for name, logit in logits(learnt).items():
        assert name == "factor" or bool((logit[0, 0] == 4.0).all())
        assert bool((logit[5:] != make(weights(), spec).__dict__[name][5:]).any())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_short_last_group_is_a_group_of_its_own(spec: QuantSpec) -> None:
    if spec.group_size == -1:
        return
    size = spec.group_size
    last, weight = 40 // size * size, weights()
    whole, alone = make(weight, spec), make(weight[:, last:], spec)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        whole.step(grad, 0.0, 0.1)
        alone.step(grad[:, last:], 0.0, 0.1)
    torch.testing.assert_close(whole.fake_quantized()[:, last:], alone.fake_quantized(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2])
def test_rows_in_chunks_are_the_rows_alone(bits: int) -> None:
    columns = CHUNK // 4  # four rows a chunk
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(5))
    grad = torch.randn(6, columns, generator=torch.Generator().manual_seed(6))
    whole = make(weight, QuantSpec(bits, 64))
    whole.step(grad, 0.0, 0.2)
    for row in (0, 3, 4, 5):
        alone = make(weight[row : row + 1], QuantSpec(bits, 64))
        alone.step(grad[row : row + 1], 0.0, 0.2)
        assert torch.equal(whole.fake_quantized()[row : row + 1], alone.fake_quantized())


@pytest.mark.parametrize("spec", [QuantSpec(1, 16), QuantSpec(2, 16), QuantSpec(2, 16, True)], ids=str)
def test_descent_lowers_the_loss_of_a_layer(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 48, generator=generator)
    low_rank = torch.randn(48, 8, generator=generator) @ torch.randn(8, 48, generator=generator)
    x = torch.randn(512, 48, generator=generator) @ (low_rank + torch.eye(48))  # as activations are
    learnt, target = make(weight, spec), x @ weight.T
    losses = []
    for _ in range(150):
        fake = learnt.fake_quantized().requires_grad_()
        loss = (x @ fake.T - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        learnt.step(fake.grad, 0.0, 0.03)
    assert min(losses) < 0.82 * losses[0]


def test_each_is_for_its_widths() -> None:
    with pytest.raises(ValueError, match="at least 2 bits"):
        Clipping(weights(), QuantSpec(1, 16))
    with pytest.raises(ValueError, match="one bit"):
        Spread(weights(), QuantSpec(2, 16))

"""Salient channels and binary ones: gradients against automatic differentiation, the start, and what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import encode
from bitfloor.core.packed import dequantize, nbytes
from bitfloor.core.spec import QuantSpec
from bitfloor.formats.native import reject
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.two_tier import LearnedScales, row_statistics, salient_count

DTYPES = ["float16", "bfloat16"]
COUNTS = [0, 1, 8, 39, 40]  # of 40 columns
NAMES = ("spread", "rows", "columns")


def weights(rows: int = 12, columns: int = 40, seed: int = 0) -> Tensor:
    """The first rows and columns are no pleasure."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 8
    weight[:, 5] = 0.0
    weight[:, 6] = 0.25
    weight[0] = 0.0
    weight[1] = weight[1].abs()
    weight[2] = -weight[2].abs()
    weight[3, ::2] = 0.0
    return weight


def make(weight: Tensor, count: int, dtype: str = "float16", bits: int = 4, seed: int = 3) -> LearnedScales:
    """Some columns salient, on the grid of their range."""
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    salient, others = order[:count].sort().values, order[count:].sort().values
    codes, grid = None, None
    if count:
        part = weight[:, salient].contiguous()
        grid = minmax_grid(part, QuantSpec(bits, -1, scale_dtype=dtype))
        codes = encode(part, grid)
    return LearnedScales(weight, salient, others, codes, grid, getattr(torch, dtype))


def shaken(learnt: LearnedScales, seed: int = 1) -> LearnedScales:
    """Parameters away from their start, some of them negative; spreads that are zero stay so."""
    generator = torch.Generator().manual_seed(seed)
    for name in NAMES:
        own = getattr(learnt, name)
        own.mul_(1.0 + 0.8 * torch.randn(own.shape, generator=generator))
    return learnt


def through(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded through the storage type, with gradient one."""
    return values + (values.to(dtype).float() - values).detach()


def binary(weight: Tensor, learnt: LearnedScales, own: dict[str, Tensor]) -> Tensor:
    """The columns that are not salient, from the formulas, as a graph."""
    part = weight[:, learnt.others]
    used = (part != 0).float()
    mean = part.sum(1) / used.sum(1).clamp_min(1)
    plus = torch.where(part >= mean[:, None], 1.0, 0.0)
    scale = through(2 * own["rows"] * own["spread"], learnt.dtype)
    offset = through(own["rows"] * (mean - own["spread"]), learnt.dtype)
    return (plus * scale[:, None] + offset[:, None]) * through(own["columns"], learnt.dtype)


@pytest.mark.parametrize("count", [0, 8, 39])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_automatic_differentiation(dtype: str, count: int) -> None:
    weight = weights()
    learnt = shaken(make(weight, count, dtype))
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    own = {name: getattr(learnt, name).clone().requires_grad_() for name in NAMES}
    made = binary(weight, learnt, own)
    alive = learnt.alive
    torch.testing.assert_close(learnt.fake_quantized()[:, learnt.others][alive], made[alive], rtol=1e-5, atol=1e-7)
    exact = torch.autograd.grad((made * grad[:, learnt.others]).sum(), list(own.values()))
    learnt.step(grad, 0.01, 0.0)
    for name, gradient in zip(own, exact, strict=True):
        found = learnt.adam.moments[name][0] / (1 - learnt.adam.betas[0])
        if name == "spread":
            gradient = gradient * alive  # a row of one number does not learn to be two
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
        # Of a single column every row is one number.
        assert bool((found != 0).any()) is (name != "spread" or count < 39) and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_trained_is_what_is_stored(dtype: str, count: int) -> None:
    learnt = shaken(make(weights(), count, dtype))
    if count < 40:
        learnt.columns[0] = 0.0
        learnt.columns[-1] = -2.0
    packed = learnt.snapshot().pack(getattr(torch, dtype))
    assert reject(packed) is None
    assert torch.equal(learnt.fake_quantized(), dequantize(packed))
    assert bool(torch.isfinite(learnt.fake_quantized()).all())
    assert [(part.columns, part.bits) for part in packed.segments] == [
        own for own in ((count, 4), (40 - count, 1)) if own[0]
    ]
    # Two parts store an order, one has none; channels of one bit have a scale each.
    assert (packed.order is None) == (count in (0, 40))
    sizes = nbytes(packed)
    assert (sizes["order"], sizes["channel_scale"]) == (0 if packed.order is None else 40, 2 * (40 - count))


def test_the_order_is_stored_even_where_it_is_natural() -> None:
    """A plan counts it before anything is known of the inputs."""
    weight = weights()
    salient, others = torch.arange(8), torch.arange(8, 40)
    grid = minmax_grid(weight[:, :8], QuantSpec(4, -1))
    codes = encode(weight[:, :8], grid)
    packed = LearnedScales(weight, salient, others, codes, grid, torch.float16).snapshot().pack(torch.float16)
    assert packed.order is not None and packed.order.tolist() == list(range(40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_start_is_the_closed_form(dtype: str) -> None:
    """Means over what is not zero; plus from the mean on; factors of one."""
    weight = weights()
    learnt = make(weight, 8, dtype)
    part = weight[:, learnt.others]
    precision = torch.finfo(getattr(torch, dtype)).eps
    for row, found in zip(part[1:], learnt.fake_quantized()[1:, learnt.others], strict=True):
        mean, spread = row[row != 0].mean(), row[row != 0].abs().mean()
        expected = torch.where(row >= mean, mean + spread, mean - spread)
        torch.testing.assert_close(found, expected, rtol=0, atol=float(4 * precision * spread))
    assert bool((learnt.rows == 1).all()) and bool((learnt.columns == 1).all())
    assert learnt.mean.shape == learnt.spread.shape == learnt.rows.shape == (12,) and learnt.columns.shape == (32,)


def test_the_sign_of_the_mean_itself_is_plus() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.0, -2.0, 2.0], [3.0, 1.0, 2.0, 2.0, 2.0]])
    learnt = LearnedScales(weight, torch.arange(0), torch.arange(5), None, None, torch.float16)
    assert learnt.mean.tolist() == [0.0, 2.0]
    assert learnt.signs.tolist() == [[0, 1, 1, 0, 1], [1, 0, 1, 1, 1]]
    assert learnt.fake_quantized()[0].tolist() == [-1.5, 1.5, 1.5, -1.5, 1.5]


def test_statistics_leave_zeros_out_and_know_rows_of_one_number() -> None:
    mean, spread = row_statistics(torch.tensor([[0.0, 2.0, -4.0], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [0.0, 3.0, 3.0]]))
    assert mean.tolist() == [-1.0, 0.0, pytest.approx(0.1), 3.0]
    assert spread.tolist() == [3.0, 0.0, 0.0, 3.0]
    mean, spread = row_statistics(torch.zeros(3, 0))
    assert mean.tolist() == spread.tolist() == [0.0] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 8])
def test_rows_of_one_number_stay_it(count: int, dtype: str) -> None:
    weight = weights()
    weight[4] = 0.7
    weight[5] = -0.7
    weight[6] = 1e-9  # below the smallest number of float16
    learnt = make(weight, count, dtype)
    start = learnt.fake_quantized()[:, learnt.others]
    torch.testing.assert_close(start[4:6], weight[4:6, learnt.others], rtol=4e-3, atol=0)
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        learnt.step(torch.randn(weight.shape, generator=generator), 0.01, 0.0)
    fake = learnt.fake_quantized()[:, learnt.others]
    assert not bool(fake[0].any()) and bool(torch.isfinite(fake).all())
    assert float(fake[6].abs().max()) < 1e-8
    for row in (4, 5):
        shares = fake[row] / learnt.columns.to(getattr(torch, dtype)).float()
        assert float(shares.max() - shares.min()) < 1e-5
    assert not torch.equal(fake[4], start[4])  # its factor learns, as those of the columns


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_size_of_weights_leaves_the_numbers_that_are_stored(dtype: str) -> None:
    """Magnitudes beyond float16 at both ends: cut, and what is stored is still what is trained."""
    for size in (1e-42, 1e-9, 1e-6, 1e3, 1e6, 1e30):
        learnt = make(size * weights(), 8, dtype)
        learnt.step(torch.randn(12, 40, generator=torch.Generator().manual_seed(5)), 0.05, 0.0)
        fake = learnt.fake_quantized()
        assert bool(torch.isfinite(fake).all())
        assert torch.equal(fake, dequantize(learnt.snapshot().pack(getattr(torch, dtype))))


def test_columns_may_pass_through_zero() -> None:
    """A gradient that pushes the factor of a column down: it becomes negative, and nothing else does."""
    weight = weights()
    learnt = make(weight, 0)
    grad = torch.zeros_like(weight)
    grad[:, 7] = learnt.fake_quantized()[:, 7]
    seen = []
    for _ in range(30):
        learnt.step(grad, 0.05, 0.0)
        seen.append(float(learnt.columns[7]))
        grad[:, 7] = learnt.fake_quantized()[:, 7] / seen[-1] if seen[-1] else grad[:, 7]
        packed = learnt.snapshot().pack(torch.float16)
        assert torch.equal(learnt.fake_quantized(), dequantize(packed))
    assert seen[0] > 0 > seen[-1]
    assert bool((learnt.columns[torch.arange(40) != 7] == 1).all())


def test_nothing_is_learned_where_all_is_salient() -> None:
    learnt = make(weights(), 40)
    before = learnt.fake_quantized()
    learnt.step(torch.ones(12, 40), 0.1, 0.0)
    assert torch.equal(before, learnt.fake_quantized()) and learnt.steps == 0
    assert learnt.snapshot().binary is None


def test_nothing_is_salient_at_a_share_of_zero() -> None:
    snapshot = make(weights(), 0).snapshot()
    assert snapshot.codes is None and snapshot.grid is None
    assert snapshot.binary is not None and snapshot.binary.codes.shape == (12, 40)
    assert set(snapshot.binary.codes.unique().tolist()) == {0, 1}


def test_snapshots_stay_what_they_were() -> None:
    weight = weights()
    learnt = make(weight, 8)
    first = learnt.snapshot()
    before = dequantize(first.pack(torch.float16))
    for _ in range(3):
        learnt.step(torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)), 0.05, 0.0)
    assert torch.equal(before, dequantize(first.pack(torch.float16)))
    assert not torch.equal(before, learnt.fake_quantized())
    assert torch.equal(before[:, learnt.salient], learnt.fake_quantized()[:, learnt.salient])


def test_a_step_is_one_of_adamw_and_factors_take_twice_the_rate() -> None:
    weight = weights()
    learnt = make(weight, 8)
    before = {name: getattr(learnt, name).clone() for name in NAMES}
    theirs = {name: value.clone().requires_grad_() for name, value in before.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["spread"]], "lr": 0.01},
            {"params": [theirs["rows"], theirs["columns"]], "lr": 0.02},
        ],
        betas=(0.9, 0.999),
        weight_decay=0.0,
    )
    generator = torch.Generator().manual_seed(7)
    for t in range(1, 5):
        held = {name: learnt.adam.moments.get(name, torch.zeros(2, *before[name].shape))[0].clone() for name in NAMES}
        learnt.step(torch.randn(weight.shape, generator=generator), 0.01, 0.5)
        for name in NAMES:
            theirs[name].grad = (learnt.adam.moments[name][0] - 0.9 * held[name]) / 0.1  # the gradient of this step
        optimizer.step()
        assert learnt.steps == t
    for name in NAMES:
        torch.testing.assert_close(getattr(learnt, name), theirs[name].detach(), rtol=0, atol=1e-5)


def test_descent_lowers_the_loss_of_a_layer() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(32, 48, generator=generator) / 7
    low_rank = torch.randn(48, 8, generator=generator) @ torch.randn(8, 48, generator=generator)
    x = torch.randn(512, 48, generator=generator) @ (low_rank + torch.eye(48))  # as activations are
    learnt, target = make(weight, 9), x @ weight.T
    losses = []
    for _ in range(150):
        fake = learnt.fake_quantized().requires_grad_()
        loss = (x @ fake.T - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert fake.grad is not None
        learnt.step(fake.grad, 0.01, 0.0)
    assert min(losses) < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("columns", "ratio", "multiple", "count"),
    [
        (4096, 0.2, 16, 816),
        (11008, 0.2, 16, 2192),
        (576, 0.2, 16, 112),
        (4096, 0.2, 1, 819),
        (4096, 0.0, 16, 0),
        (4097, 1.0, 16, 4097),
        (48, 0.2, 16, 9),  # narrower than a multiple by the ratio
        (4, 0.2, 16, 0),
        (100, 0.29, 1, 29),  # 28.999999999999996
        (5, 0.2, 1, 1),
        (80, 0.999, 16, 64),
    ],
)
def test_so_many_channels_are_salient(columns: int, ratio: float, multiple: int, count: int) -> None:
    assert salient_count(columns, ratio, multiple) == count


def test_the_grid_of_another_range_is_kept_as_it_is() -> None:
    """A grid of whole rows, as published, on the salient columns alone."""
    weight = weights()
    salient, others = torch.arange(0, 8), torch.arange(8, 40)
    grid = replace(minmax_grid(weight, QuantSpec(4, -1)), group_size=8)
    codes = encode(weight[:, :8].contiguous(), grid)
    learnt = LearnedScales(weight, salient, others, codes, grid, torch.float16)
    found = learnt.fake_quantized()[:, :8]
    assert float(((found - weight[:, :8]).abs() / grid.scale).max()) < 0.51
    assert torch.equal(learnt.fake_quantized(), dequantize(learnt.snapshot().pack(torch.float16)))

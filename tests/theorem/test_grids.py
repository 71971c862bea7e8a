"""What the searched grid promises over the min-max grid, and what a bit buys."""

from __future__ import annotations

import pytest
import torch
from theorem.toy_layer import toy_layer

from bitfloor.core.affine import decode, encode
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.solvers.gptq import gptq
from bitfloor.solvers.ranges import minmax_grid, search_grid

SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weighted_search_lowers_the_output_error_on_anisotropic_inputs(seed: int, bits: int, symmetric: bool) -> None:
    layer = toy_layer(seed, correlated=False)
    spec = QuantSpec(bits, 32, symmetric)
    start = minmax_grid(layer.weight, spec)
    found = search_grid(layer.weight, layer.hessian.diagonal(), spec)
    before, after = (layer.loss(decode(encode(layer.weight, grid), grid)) for grid in (start, found))
    assert after < 0.95 * before


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [2, 3])
def test_knowing_the_importances_is_better_than_counting_channels_alike(seed: int, bits: int) -> None:
    layer = toy_layer(seed, correlated=False)
    spec = QuantSpec(bits, 32)
    blind = search_grid(layer.weight, torch.ones(96), spec)
    found = search_grid(layer.weight, layer.hessian.diagonal(), spec)
    assert layer.loss(decode(encode(layer.weight, found), found)) < layer.loss(
        decode(encode(layer.weight, blind), blind)
    )
    assert layer.drift(decode(encode(layer.weight, blind), blind)) < layer.drift(
        decode(encode(layer.weight, found), found)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", ["minmax", "search", "gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_bit_lowers_the_error(seed: int, method: str, symmetric: bool) -> None:
    layer = toy_layer(seed)
    losses = []
    for bits in BITS:
        spec = QuantSpec(bits, 32, symmetric)
        if method == "minmax":
            grid = minmax_grid(layer.weight, spec)
        else:
            grid = search_grid(layer.weight, layer.hessian.diagonal(), spec)
        codes = gptq(layer.weight, layer.hessian, grid).codes if method == "gptq" else encode(layer.weight, grid)
        losses.append(layer.loss(decode(codes, grid)))
    assert losses == sorted(losses, reverse=True)
    # Six decibels a bit: from four bits to eight the error falls about 16^2-fold; float16 scales take a part of that.
    assert losses[-1] < losses[BITS.index(4)] / 50


@pytest.mark.parametrize("seed", SEEDS)
def test_smaller_groups_lower_the_error(seed: int) -> None:
    layer = toy_layer(seed)
    losses = []
    for group_size in (-1, 32, 8):
        grid = search_grid(layer.weight, layer.hessian.diagonal(), QuantSpec(3, group_size))
        losses.append(layer.loss(decode(encode(layer.weight, grid), grid)))
    assert losses == sorted(losses, reverse=True)

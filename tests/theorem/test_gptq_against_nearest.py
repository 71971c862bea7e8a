"""GPTQ trades weight error for output error: better where it counts, worse where it does not."""

from __future__ import annotations

import pytest
import torch
from theorem.toy_layer import toy_layer

from bitfloor.core.affine import decode, encode
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.gptq import GridSearch, gptq
from bitfloor.solvers.ranges import minmax_grid, search_grid

SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_nearest_on_unseen_outputs_and_loses_on_weights(seed: int, bits: int, act_order: bool) -> None:
    layer = toy_layer(seed)
    grid = minmax_grid(layer.weight, QuantSpec(bits, 32))
    nearest = decode(encode(layer.weight, grid), grid)
    solved = decode(gptq(layer.weight, layer.hessian, grid, act_order=act_order).codes, grid)
    # Not by a hair: on correlated inputs a fifth of the output error goes at the least.
    assert layer.loss(solved) < 0.8 * layer.loss(nearest)
    assert layer.drift(solved) > layer.drift(nearest)


@pytest.mark.parametrize("seed", SEEDS)
def test_gptq_beats_nearest_in_nearly_every_row(seed: int) -> None:
    layer = toy_layer(seed)
    grid = search_grid(layer.weight, layer.hessian.diagonal(), QuantSpec(3, 32))
    errors = []
    for approximation in (
        decode(gptq(layer.weight, layer.hessian, grid).codes, grid),
        decode(encode(layer.weight, grid), grid),
    ):
        errors.append((layer.unseen @ (approximation - layer.weight).T).square().sum(0))
    # Greedy, so a single row may lose; nine in ten must not.
    assert float((errors[0] < errors[1]).float().mean()) > 0.9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [2, 3])
def test_act_order_does_not_lose_on_the_whole(seed: int, bits: int) -> None:
    layer = toy_layer(seed)
    grid = minmax_grid(layer.weight, QuantSpec(bits, 32))
    natural, ordered = (
        layer.loss(decode(gptq(layer.weight, layer.hessian, grid, act_order=flag).codes, grid))
        for flag in (False, True)
    )
    # A heuristic, not a theorem: with channel sizes over a decade it wins, and it must never be clearly worse.
    assert ordered < 1.02 * natural


@pytest.mark.parametrize("seed", SEEDS)
def test_infinite_damping_is_rounding_to_nearest(seed: int) -> None:
    # H + lambda I tends to a multiple of the identity, whose columns do not speak to each other.
    layer = toy_layer(seed)
    grid = minmax_grid(layer.weight, QuantSpec(3, 32))
    solved = gptq(layer.weight, layer.hessian, grid, damping=1e8).codes
    # Updates are 1e-8 of a step; a code differs only where a weight lies that close to a tie.
    assert float((solved != encode(layer.weight, grid)).float().mean()) < 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_column_swept_is_rounded_to_nearest(seed: int) -> None:
    # Errors flow forwards only; with act-order the first column is the one with the largest inputs.
    layer = toy_layer(seed)
    grid = minmax_grid(layer.weight, QuantSpec(3, 32))
    first = int(layer.hessian.diagonal().argmax())
    codes = gptq(layer.weight, layer.hessian, grid).codes
    assert torch.equal(codes[:, first], encode(layer.weight, grid)[:, first])


@pytest.mark.parametrize("bits", [2, 3])
def test_grids_found_on_the_way_beat_those_fixed_beforehand(bits: int) -> None:
    # A heuristic: it follows the weights that the errors of earlier columns have moved. In the same order of columns;
    # whole groups in order of importance are a coarser order than column by column, which only fixed grids allow.
    spec, found, fixed = QuantSpec(bits, 32), 0.0, 0.0
    for seed in SEEDS:
        layer = toy_layer(seed)
        weight = layer.hessian.diagonal()
        search = GridSearch(32, lambda _, part, at, weight=weight: search_grid(part, weight[at], spec))
        on_the_way = gptq(layer.weight, layer.hessian, search, act_order=False)
        grid = search_grid(layer.weight, weight, spec)
        beforehand = gptq(layer.weight, layer.hessian, grid, act_order=False)
        found += layer.loss(decode(on_the_way.codes, on_the_way.grid))
        fixed += layer.loss(decode(beforehand.codes, beforehand.grid))
    assert found < fixed

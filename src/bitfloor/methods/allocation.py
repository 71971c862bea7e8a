"""Salience-determined bit allocation over a block: the widths of its groups, before anything of it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitfloor.calib.stats import HessianSum
from bitfloor.core.affine import decode, encode
from bitfloor.core.basis import Basis, by_size
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.linalg import all_finite
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, stages
from bitfloor.methods.gptq import MIN_TOKENS_PER_CHANNEL, Errors
from bitfloor.methods.options import GptqConfig
from bitfloor.solvers.ranges import search_grid, tempered
from bitfloor.solvers.salience import group_salience, removal_costs
from bitfloor.solvers.slim_bits import Sweep, candidates, widths_of

PATIENCE = 2  # further promotions without a gain after which GPTQ is not asked again


@dataclass(frozen=True)
class SbaConfig:
    """How SBA searches.

    Args:
        uniform: try no promotion at all too.
        ranges: ``"minmax"`` rounds the candidates as published; ``"search"`` by the searched grids of the project;
            ``"gptq"`` by GPTQ on those, with the candidate's widths; what that leaves of the output's error decides.
        importance: exponent of the Hessian's diagonal in that search.
        positional: salience as published, conditional on the order of columns.
        damping: of the Hessian, relative, in salience and in GPTQ.
        sort: put input channels into order of their second moment before they are cut into groups.
    """

    uniform: bool = False
    ranges: str = "minmax"
    importance: float = 0.5
    positional: bool = True
    damping: float = 0.01
    sort: bool = False


@dataclass(frozen=True)
class Widths:
    """The widths of one matrix, and why.

    Args:
        widths: of every group.
        why: ``salience`` by group, ``promoted`` groups ``p``, ``divergence`` a token by ``p``; ``note`` if nothing
            was searched.
        channels: the order of input channels that groups are cut from, empty for natural order.
    """

    widths: tuple[int, ...]
    why: Mapping[str, Any] = field(default_factory=dict)
    channels: bytes = b""


def allocate_block(
    block: Block, inputs: Batches, specs: Mapping[str, QuantSpec], config: SbaConfig, few: int | None = None
) -> dict[str, Widths]:
    """Widths of all groups of a block's matrices.

    As published, salience is that of the float block on the quantized model's inputs, all matrices of the block at
    once; those fed by one tensor share its inverse Hessian. Two passes of the block, or one with ``ranges: gptq``.

    Args:
        block: the float block.
        inputs: its inputs in the quantized model.
        specs: storage by name; ``bits`` is the mean width.
        config: how.
        few: batches that the divergences are measured on, None for all; salience sees all of them.

    Raises:
        BitfloorError: activations that are not finite.
    """
    if not specs:
        return {}
    groups = [group for stage in stages(block, inputs, specs) for group in stage]
    groups = [tuple(name for name in group if name in specs) for group in groups]
    groups = [group for group in groups if group]
    sums = {group[0]: HessianSum(block.weight(group[0]).shape[1], block.weight(group[0]).device) for group in groups}
    block.observe(inputs, lambda name, x: sums[name].add(x), list(sums))
    found: dict[str, Widths] = {}
    sweeps: dict[str, dict[str, Sweep]] = {}
    bases: dict[str, Basis] = {}
    for group in groups:
        seen = sums.pop(group[0])
        if not all_finite(seen.total):
            raise BitfloorError(f"the activations that enter {group[0]} are not finite; check the model.")
        columns = seen.total.shape[0]
        if seen.rows < MIN_TOKENS_PER_CHANNEL * columns:
            note = f"saw {seen.rows} calibration tokens for {columns} input channels; all groups keep their width"
            found.update({n: Widths(specs[n].group_widths(columns), {"note": note}) for n in group})
            continue
        channels = by_size(seen.total.diagonal()) if config.sort else b""
        bases.update({name: Basis(channels, specs[name].rotation) for name in group})
        if config.ranges == "gptq":
            for name in group:
                weight, hessian = bases[name].to(block.weight(name)), bases[name].both(seen.total)
                found[name] = _by_errors(weight, hessian, specs[name], config, channels)
            continue
        inputs_of = {basis: _seen(seen.total, basis, config) for basis in dict.fromkeys(bases[n] for n in group)}
        sweeps[group[0]] = {
            name: _sweep(bases[name].to(block.weight(name)), inputs_of[bases[name]], specs[name], config)
            for name in group
        }
        del seen
        trim_heap()

    def add(name: str, x: Tensor) -> None:
        turned: dict[Basis, Tensor] = {}
        for member, sweep in sweeps[name].items():
            basis = bases[member]
            if basis not in turned:
                turned[basis] = basis.to(x.float())
            sweep.add(turned[basis])

    if sweeps:
        looked_at = range(len(inputs) if few is None else min(few, len(inputs)))
        block.observe((inputs[i] for i in looked_at), add, list(sweeps))
    for own in sweeps.values():
        for name, sweep in own.items():
            found[name] = _widths(sweep, specs[name], bases[name].channels)
    return {name: found[name] for name in specs}


@dataclass(frozen=True)
class _Input:
    """What is known of a matrix's input, in the basis of the matrix.

    Args:
        costs: ``[I]`` of :func:`bitfloor.solvers.salience.removal_costs`.
        importance: ``[I]`` weight of a channel in the search of ranges.
    """

    costs: Tensor
    importance: Tensor


def _seen(hessian: Tensor, basis: Basis, config: SbaConfig) -> _Input:
    own = basis.both(hessian)
    costs = removal_costs(own, damping=config.damping, positional=config.positional)
    return _Input(costs, tempered(own.diagonal(), config.importance))


def _sweep(weight: Tensor, seen: _Input, spec: QuantSpec, config: SbaConfig) -> Sweep:
    size = spec.columns_per_group(weight.shape[1])
    salience = group_salience(weight, seen.costs, size)
    importance = seen.importance if config.ranges == "search" else None

    def rounded(step: int) -> Tensor:
        grid = search_grid(weight, importance, replace(spec, bits=spec.bits + step, widths=()))
        return decode(encode(weight, grid), grid)

    return Sweep(weight, rounded, salience, size, candidates(len(salience), config.uniform))


def _by_errors(weight: Tensor, hessian: Tensor, spec: QuantSpec, config: SbaConfig, channels: bytes) -> Widths:
    """Widths by what GPTQ with them leaves of the output's error; ``p`` rises until it has not gained for a while."""
    costs = removal_costs(hessian, damping=config.damping, positional=config.positional)
    salience = group_salience(weight, costs, spec.columns_per_group(weight.shape[1]))
    how = GptqConfig(importance=config.importance, damping=config.damping, static_groups=False)
    errors = Errors(weight, hessian, weight.new_ones(len(weight)), spec, how)
    energy = max(float(((weight @ hessian) * weight).sum(dtype=torch.float64)), 1e-300)
    left: dict[int, float] = {}
    best = 0
    for p in candidates(len(salience), config.uniform):
        left[p] = float(errors.of(widths_of(salience, spec.bits, p)).sum()) / energy
        best = min(left, key=left.__getitem__)
        if p - best >= PATIENCE:
            break
    why = {
        "salience": [float(f"{value:.6g}") for value in salience.tolist()],
        "promoted": best,
        "error": {str(p): float(f"{value:.6g}") for p, value in left.items()},
    }
    return Widths(widths_of(salience, spec.bits, best), why, channels)


def _widths(sweep: Sweep, spec: QuantSpec, channels: bytes) -> Widths:
    if not sweep.tokens:
        note = "no token of the sequences that were looked at entered it; all groups keep their width"
        return Widths((spec.bits,) * len(sweep.salience), {"note": note})
    best = sweep.best()
    tokens = sweep.tokens
    why = {
        "salience": [float(f"{value:.6g}") for value in sweep.salience.tolist()],
        "promoted": best,
        "divergence": {str(p): float(f"{loss / tokens:.6g}") for p, loss in sweep.loss.items()},
    }
    return Widths(widths_of(sweep.salience, spec.bits, best), why, channels)

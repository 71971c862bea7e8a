"""PTQ1.61 (arXiv 2502.13179) over a block: salient channels at four bits, the others at one, learned scales."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, encode
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, MatrixReport, Need, stages
from bitfloor.methods.learning import Objective, Stacked, learn_block, learning_of, units
from bitfloor.methods.options import Ptq161Config
from bitfloor.solvers.block_opt import Schedule
from bitfloor.solvers.ranges import minmax_grid, search_grid
from bitfloor.solvers.two_tier import LearnedScales, TwoTiers, row_statistics, salient_count


class Ptq161:
    """A structured mask over input channels, and scales learned block by block.

    Channels are scored on the float model's inputs; matrices fed by one tensor share the mask, and so the order in
    which their columns are stored. Signs and codes stay as they are found.

    Deviations: the number of salient channels is rounded down to a multiple (the code takes one more than a fifth, and
    ties); the best step on fixed batches is kept; batches come in random order; the last position is not compared;
    zero-points count from 0 to 15 and scales are 16-bit numbers at every step.
    """

    name: ClassVar[str] = "ptq161"
    paper: ClassVar[str] = "PTQ1.61, arXiv 2502.13179"
    summary: ClassVar[str] = "a fifth of the channels at 4 bits, the others at 1, scales learned; an hour per model"
    Config: ClassVar[type[Ptq161Config]] = Ptq161Config
    # fake-quantized weight, its gradient, what that is summed from; sign or code; vectors, less than a byte a weight
    learnt_bytes: ClassVar[int] = 14

    def __init__(self, config: Ptq161Config, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    @property
    def needs(self) -> frozenset[Need]:
        needs = {Need.INPUTS, Need.EXACT, Need.TARGETS}
        return frozenset(needs | ({Need.GRADIENTS} if self.config.steps else set()))

    def tiers(self, columns: int) -> list[tuple[int, int]]:
        """See :class:`bitfloor.methods.base.Method`."""
        count = salient_count(columns, self.config.ratio, self.config.multiple)
        return [(own, bits) for own, bits in ((count, self.config.salient_bits), (columns - count, 1)) if own]

    def quantize_block(
        self,
        block: Block,
        inputs: Batches,
        specs: Mapping[str, QuantSpec],
        exact: Batches = (),
        targets: Batches = (),
    ) -> BlockResult:
        """See :class:`bitfloor.methods.base.Method`."""
        result = BlockResult()
        if not specs:
            return result
        began = time.perf_counter()
        config, parts, notes = self.config, {}, {}
        for group, order, note in self._orders(block, exact, specs):
            count = salient_count(len(order), config.ratio, config.multiple)
            salient, others = order[:count].sort().values, order[count:].sort().values
            for name in group:
                weight, spec = block.weight(name).contiguous(), specs[name]
                codes, grid = self._salient(weight, salient, spec) if count else (None, None)
                dtype = getattr(torch, spec.scale_dtype)
                parts[name] = LearnedScales(weight, salient, others, codes, grid, dtype)
                notes[name] = note
        tall = units(block, specs)
        learnt = {
            unit: Stacked([parts[n] for n in names]) if len(names) > 1 else parts[names[0]]
            for unit, names in tall.items()
        }
        schedule = Schedule(
            config.steps if any(len(part.others) for part in parts.values()) else 0,
            config.rate,
            check_every=config.check_every,
            patience=config.patience,
            seed=self.seed,
            decay=False,
        )
        objective = Objective(both=config.both, cosine=config.cosine)
        outcome = learn_block(block, inputs, targets, learnt, schedule, objective)
        seconds = (time.perf_counter() - began) / len(specs)
        result.learning = learning_of(outcome)
        best: dict[str, TwoTiers] = {}
        for unit, names in tall.items():
            best.update(zip(names, outcome.best[unit] if len(names) > 1 else [outcome.best[unit]], strict=True))
        for index, (name, spec) in enumerate(specs.items()):
            result.weights[name] = best[name].pack(getattr(torch, spec.scale_dtype))
            told = [note for note in (notes[name], outcome.note if index == 0 else None) if note]
            result.reports[name] = MatrixReport(None, seconds, "; ".join(told) or None)
        trim_heap()
        return result

    def _orders(
        self, block: Block, exact: Batches, specs: Mapping[str, QuantSpec]
    ) -> list[tuple[tuple[str, ...], Tensor, str | None]]:
        """Matrices fed by one tensor, their channels by falling score, and what is to be said of that."""
        groups = [group for stage in stages(block, exact, specs) for group in stage]
        seen = {group[0]: _Score(block.weight(group[0]).shape[1], block.weight(group[0]).device) for group in groups}
        block.observe(exact, lambda name, x: seen[name].add(x), list(seen))
        found = []
        for index, group in enumerate(groups):
            own, note = seen[group[0]], None
            if not own.rows and self.config.score != "random":
                note = "saw no calibration token; its salient channels are those with the largest weights"
            score = self._score(own, [block.weight(name) for name in group], self.seed + index)
            if not bool(torch.isfinite(score).all()):
                raise BitfloorError(f"the activations that enter {group[0]} are not finite; check the model.")
            found.append((group, torch.argsort(score, descending=True, stable=True), note))
        return found

    def _score(self, seen: _Score, weights: Sequence[Tensor], seed: int) -> Tensor:
        """How much a channel would gain by more bits, ``[I]``."""
        kind = self.config.score
        if kind == "random":
            columns = weights[0].shape[1]
            return torch.rand(columns, generator=torch.Generator().manual_seed(seed)).to(weights[0].device)
        if not seen.rows:
            return sum((weight.square().sum(0) for weight in weights), weights[0].new_zeros(weights[0].shape[1]))
        if kind != "gain":
            return seen.largest if kind == "max" else seen.total / seen.rows
        gain = torch.zeros_like(seen.squares)
        for weight in weights:
            mean, spread = (part.unsqueeze(1) for part in row_statistics(weight))
            gain += (weight - mean - torch.where(weight >= mean, spread, -spread)).square().sum(0)
        return gain * seen.squares / seen.rows

    def _salient(self, weight: Tensor, salient: Tensor, spec: QuantSpec) -> tuple[Tensor, Grid]:
        """Codes and grid of the salient columns, one group a row."""
        own = replace(spec, bits=self.config.salient_bits, group_size=-1, symmetric=False, widths=())
        part = weight.index_select(1, salient).contiguous()
        if self.config.range == "row":
            grid = replace(minmax_grid(weight, own), group_size=len(salient))
        elif self.config.range == "salient":
            grid = minmax_grid(part, own)
        else:
            grid = search_grid(part, torch.ones(len(salient), device=part.device), own)
        return encode(part, grid), grid


class _Score:
    """Magnitudes of the input channels of one group: largest, summed, and summed squares, ``[I]`` float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.largest, self.total, self.squares = (torch.zeros(columns, device=device) for _ in range(3))
        self.rows = 0

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        values = x.float().abs()
        torch.maximum(self.largest, values.amax(0), out=self.largest)
        self.total += values.sum(0)
        self.squares += values.square().sum(0)
        self.rows += len(values)

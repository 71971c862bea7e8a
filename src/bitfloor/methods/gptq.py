"""GPTQ (arXiv 2210.17323) over a block: input group by input group, each seeing the quantized ones before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from bitfloor.calib.stats import DriftSum, HessianSum
from bitfloor.core.affine import Grid, decode, encode, pack
from bitfloor.core.heap import trim_heap
from bitfloor.core.metrics import output_error
from bitfloor.core.packed import dequantize
from bitfloor.core.rotation import rotate, rotate_both
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, MatrixReport, Need, stages
from bitfloor.methods.options import GptqConfig
from bitfloor.solvers.descent import descend
from bitfloor.solvers.gptq import GptqResult, GridSearch, gptq
from bitfloor.solvers.ranges import search_grid, tempered

# Below this many calibration tokens per input channel the Hessian says more about the tokens than about the layer.
MIN_TOKENS_PER_CHANNEL = 0.25


class Gptq:
    """Error-compensating rounding."""

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "GPTQ, arXiv 2210.17323"
    summary: ClassVar[str] = "rounding that spreads each column's error over the columns to come; minutes per model"
    Config: ClassVar[type[GptqConfig]] = GptqConfig
    learnt_bytes: ClassVar[int] = 0

    def __init__(self, config: GptqConfig) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[Need]:
        needs = {Need.INPUTS, Need.HESSIAN}
        return frozenset({*needs, Need.EXACT} if self.config.correction else needs)

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
        done: dict[str, Tensor] = {}
        for stage in stages(block, inputs, specs):
            paired = bool(self.config.correction)
            seen = {group[0]: _Seen(block.weight(group[0]), paired, block.products) for group in stage}
            if paired:
                block.observe_pairs(
                    exact, inputs, lambda name, e, x, seen=seen: seen[name].add_pair(e, x), list(seen), done or None
                )
            else:
                block.observe(inputs, lambda name, x, seen=seen: seen[name].hessian.add(x), list(seen), done or None)
            for group in stage:
                self._solve(block, group, seen.pop(group[0]), specs, result)
                for name in group:
                    done[name] = dequantize(result.weights[name])
                trim_heap()
        return result

    def _solve(
        self,
        block: Block,
        group: tuple[str, ...],
        seen: _Seen,
        specs: Mapping[str, QuantSpec],
        result: BlockResult,
    ) -> None:
        """Quantize the matrices of one input group; those of equal spec are swept together, row by row independent."""
        for spec in dict.fromkeys(specs[name] for name in group):
            began = time.perf_counter()
            names = [name for name in group if specs[name] == spec]
            weights = [rotate(block.weight(name), spec.rotation) for name in names]
            hessian = rotate_both(seen.hessian.total, spec.rotation)
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
            solved, note = self._solved(stacked, seen, hessian, spec)
            seconds = (time.perf_counter() - began) / len(names)
            rows = [weight.shape[0] for weight in weights]
            parts = zip(
                names, solved.target.split(rows), solved.codes.split(rows), split_grid(solved.grid, rows), strict=True
            )
            for name, target, code, own in parts:
                error = output_error(target, decode(code, own), hessian) if seen.hessian.rows else None
                result.weights[name] = pack(code, own, spec.rotation)
                result.reports[name] = MatrixReport(error, seconds, note)

    def _solved(self, weight: Tensor, seen: _Seen, hessian: Tensor, spec: QuantSpec) -> tuple[GptqResult, str | None]:
        """One stacked matrix on its grid, and a note when something other than plain GPTQ was done.

        Args:
            weight: ``[O, I]``, rotated if it is to be.
            seen: what the calibration text showed, not rotated.
            hessian: ``[I, I]`` of the rotated inputs.
            spec: storage.
        """
        config, columns = self.config, weight.shape[1]
        rows = seen.hessian.rows
        if rows < MIN_TOKENS_PER_CHANNEL * columns:
            grid = search_grid(weight, torch.ones(columns, device=weight.device), spec)
            note = f"saw {rows} calibration tokens for {columns} input channels; rounded to nearest instead"
            return GptqResult(encode(weight, grid), grid, config.damping, weight), note
        importance = tempered(hessian.diagonal(), config.importance) if config.range == "search" else None
        grids = GridSearch(
            spec.columns_per_group(columns),
            lambda _, part, at: search_grid(part, None if importance is None else importance[at], spec),
            static=config.static_groups,
        )
        solved = gptq(
            weight,
            hessian,
            grids,
            damping=config.damping,
            act_order=config.act_order,
            drift=None if seen.drift is None else rotate_both(seen.drift.total, spec.rotation),
            correction=config.correction,
        )
        if config.sweeps:
            codes, grid = descend(
                solved.target, solved.codes, solved.grid, hessian, damping=solved.damping, sweeps=config.sweeps
            )
            solved = replace(solved, codes=codes, grid=grid)
        note = None
        if solved.damping > config.damping:
            note = f"damping raised from {config.damping:g} to {solved.damping:g} to factorise the Hessian"
        return solved, note


class _Seen:
    """What the calibration text showed of the input of one group.

    Args:
        weight: one of the group's matrices ``[O, I]``.
        paired: also how far that input has drifted from the float model's.
        products: type in which is multiplied.
    """

    def __init__(self, weight: Tensor, paired: bool, products: torch.dtype) -> None:
        self.hessian = HessianSum(weight.shape[1], weight.device)
        self.drift = DriftSum(weight.shape[1], weight.device, products) if paired else None

    def add_pair(self, exact: Tensor, x: Tensor) -> None:
        assert self.drift is not None
        self.hessian.add(x)
        self.drift.add(exact, x)


def split_grid(grid: Grid, rows: Sequence[int]) -> list[Grid]:
    """The grids of matrices that were stacked along their rows."""
    scales = grid.scale.split(list(rows))
    zeros = [None] * len(rows) if grid.zero is None else grid.zero.split(list(rows))
    offsets = [None] * len(rows) if grid.offset is None else grid.offset.split(list(rows))
    return [
        Grid(scale, zero, offset, grid.bits, grid.group_size, grid.constant_zero, grid.scale_dtype)
        for scale, zero, offset in zip(scales, zeros, offsets, strict=True)
    ]

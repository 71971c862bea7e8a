"""GPTQ (arXiv 2210.17323) over a block: input group by input group, each seeing the quantized ones before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bitfloor.calib.stats import HessianSum
from bitfloor.core.affine import Grid, decode, encode, pack
from bitfloor.core.metrics import output_error
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, MatrixReport, Need, stages
from bitfloor.methods.options import GptqConfig
from bitfloor.solvers.gptq import gptq
from bitfloor.solvers.ranges import minmax_grid, search_grid

# Below this many calibration tokens per input channel the Hessian says more about the tokens than about the layer.
MIN_TOKENS_PER_CHANNEL = 0.25


class Gptq:
    """Error-compensating rounding."""

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "GPTQ, arXiv 2210.17323"
    summary: ClassVar[str] = "rounding that spreads each column's error over the columns to come; minutes per model"
    Config: ClassVar[type[GptqConfig]] = GptqConfig

    def __init__(self, config: GptqConfig) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.INPUTS, Need.HESSIAN})

    def quantize_block(self, block: Block, inputs: Batches, specs: Mapping[str, QuantSpec]) -> BlockResult:
        """See :class:`bitfloor.methods.base.Method`."""
        result = BlockResult()
        done: dict[str, Tensor] = {}
        for stage in stages(block, inputs, specs):
            sums = {group[0]: _empty_sum(block.weight(group[0])) for group in stage}
            block.observe(inputs, lambda name, x, sums=sums: sums[name].add(x), list(sums), done or None)
            for group in stage:
                self._solve(block, group, sums.pop(group[0]), specs, result)
                for name in group:
                    done[name] = dequantize(result.weights[name])
        return result

    def _solve(
        self,
        block: Block,
        group: tuple[str, ...],
        seen: HessianSum,
        specs: Mapping[str, QuantSpec],
        result: BlockResult,
    ) -> None:
        """Quantize the matrices of one input group; those of equal spec are swept together, row by row independent."""
        for spec in dict.fromkeys(specs[name] for name in group):
            began = time.perf_counter()
            names = [name for name in group if specs[name] == spec]
            weights = [block.weight(name) for name in names]
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
            grid, codes, note = self._codes(stacked, seen, spec)
            seconds = (time.perf_counter() - began) / len(names)
            rows = [weight.shape[0] for weight in weights]
            parts = zip(names, weights, codes.split(rows), split_grid(grid, rows), strict=True)
            for name, weight, code, own in parts:
                error = output_error(weight, decode(code, own), seen.total) if seen.rows else None
                result.weights[name] = pack(code, own)
                result.reports[name] = MatrixReport(error, seconds, note)

    def _codes(self, weight: Tensor, seen: HessianSum, spec: QuantSpec) -> tuple[Grid, Tensor, str | None]:
        """Grid and codes of one stacked matrix, and a note when something other than plain GPTQ was done."""
        columns = weight.shape[1]
        if seen.rows < MIN_TOKENS_PER_CHANNEL * columns:
            grid = search_grid(weight, torch.ones(columns, device=weight.device), spec)
            note = f"saw {seen.rows} calibration tokens for {columns} input channels; rounded to nearest instead"
            return grid, encode(weight, grid), note
        if self.config.range == "search":
            grid = search_grid(weight, seen.total.diagonal(), spec)
        else:
            grid = minmax_grid(weight, spec)
        solved = gptq(weight, seen.total, grid, damping=self.config.damping, act_order=self.config.act_order)
        note = None
        if solved.damping > self.config.damping:
            note = f"damping raised from {self.config.damping:g} to {solved.damping:g} to factorise the Hessian"
        return grid, solved.codes, note


def _empty_sum(weight: Tensor) -> HessianSum:
    return HessianSum(weight.shape[1], weight.device)


def split_grid(grid: Grid, rows: Sequence[int]) -> list[Grid]:
    """The grids of matrices that were stacked along their rows."""
    scales = grid.scale.split(list(rows))
    zeros = [None] * len(rows) if grid.zero is None else grid.zero.split(list(rows))
    offsets = [None] * len(rows) if grid.offset is None else grid.offset.split(list(rows))
    return [
        Grid(scale, zero, offset, grid.bits, grid.group_size, grid.constant_zero, grid.scale_dtype)
        for scale, zero, offset in zip(scales, zeros, offsets, strict=True)
    ]

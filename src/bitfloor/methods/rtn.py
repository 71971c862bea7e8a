"""Round-to-nearest: no error feedback, only a good grid. The baseline everything must beat, and data-free if asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from bitfloor.calib.stats import MomentSum
from bitfloor.core.affine import decode, encode, pack
from bitfloor.core.basis import Basis, basis_of
from bitfloor.core.errors import BitfloorError
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, MatrixReport, Need, stages
from bitfloor.methods.options import RtnConfig
from bitfloor.solvers.ranges import minmax_grid, search_grid


class Rtn:
    """Round-to-nearest on min-max or searched grids."""

    name: ClassVar[str] = "rtn"
    paper: ClassVar[str] = "folklore; weighted search after SignRoundV2 (arXiv 2512.04746), section on initial scales"
    summary: ClassVar[str] = "nearest code on the best grid; seconds per model"
    Config: ClassVar[type[RtnConfig]] = RtnConfig
    tiers: ClassVar[None] = None
    learnt_bytes: ClassVar[int] = 0

    def __init__(self, config: RtnConfig, seed: int = 0) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.INPUTS}) if self.config.range == "search" else frozenset()

    def quantize_block(
        self,
        block: Block,
        inputs: Batches,
        specs: Mapping[str, QuantSpec],
        exact: Batches = (),
        targets: Batches = (),
    ) -> BlockResult:
        """See :class:`bitfloor.methods.base.Method`. All inputs are observed in one pass of the float block."""
        moments = self._moments(block, inputs, specs) if self.config.range == "search" else {}
        result = BlockResult()
        for name, spec in specs.items():
            began = time.perf_counter()
            weight = basis_of(spec).to(block.weight(name))
            seen = moments[name].mean() if name in moments else None
            note = None
            if seen is not None and not moments[name].rows:
                note = "saw no calibration token; its grid counts every input channel alike"
                seen = torch.ones(weight.shape[1], device=weight.device)
            grid = minmax_grid(weight, spec) if seen is None else search_grid(weight, seen, spec)
            codes = encode(weight, grid)
            error = None if seen is None else _diagonal_error(weight, decode(codes, grid), seen)
            result.weights[name] = pack(codes, grid, basis_of(spec))
            result.reports[name] = MatrixReport(error, time.perf_counter() - began, note)
        return result

    def _moments(self, block: Block, inputs: Batches, specs: Mapping[str, QuantSpec]) -> dict[str, MomentSum]:
        """Second moments of the inputs of every matrix, in its basis; those fed by one tensor share one sum."""
        sums: dict[str, MomentSum] = {}
        views: dict[str, dict[Basis, MomentSum]] = {}  # leader of an input group -> basis -> sum
        for group in (group for stage in stages(block, inputs, specs) for group in stage):
            weight = block.weight(group[0])
            own = {basis_of(specs[name]): MomentSum(weight.shape[1], weight.device) for name in group}
            sums.update({name: own[basis_of(specs[name])] for name in group})
            views[group[0]] = own

        def add(name: str, x: Tensor) -> None:
            for basis, moments in views[name].items():
                moments.add(basis.to(x))

        block.observe(inputs, add, list(views))
        for name in views:
            if not bool(torch.isfinite(sums[name].total).all()):
                raise BitfloorError(
                    f"the calibration activations that enter {name} hold NaN or infinite values; check the model."
                )
        return sums


def _diagonal_error(weight: Tensor, approximation: Tensor, moments: Tensor) -> float:
    """Relative output error under the diagonal of the Hessian, which is all that round-to-nearest collects."""
    above = float(((approximation - weight).square() * moments).sum(dtype=torch.float64))
    below = float((weight.square() * moments).sum(dtype=torch.float64))
    return above / below if below > 0 else 0.0

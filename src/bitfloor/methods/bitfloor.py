"""bitfloor's own way: error-compensated codes on searched grids, then a few steps on the whole block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, pack
from bitfloor.core.basis import basis_of
from bitfloor.core.heap import trim_heap
from bitfloor.core.packed import PackedWeight, segment_codes
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, Need
from bitfloor.methods.gptq import Gptq
from bitfloor.methods.learning import Objective, Rounded, learn_block, learnable, learning_of, split, stack, units
from bitfloor.methods.options import BitfloorConfig
from bitfloor.solvers.adamw import AdamW
from bitfloor.solvers.block_opt import Learnable, Schedule
from bitfloor.solvers.refine import Refinement

SCALE_SHARE = 0.5  # step of the scales' factors, of the rounding's step


class Bitfloor:
    """GPTQ with correction as a start, refined by gradients: their signs, or AdamW.

    Where SignRound takes 200 steps from round-to-nearest, the start has done most of their work in closed form, layer
    by layer; what is left to gradients is what layers do to each other.
    """

    name: ClassVar[str] = "bitfloor"
    paper: ClassVar[str] = "GPTQ, arXiv 2210.17323; QEP, arXiv 2504.09629; SignRound, arXiv 2309.05516"
    summary: ClassVar[str] = "GPTQ with correction as a start, then a hundred steps a block; minutes per model"
    Config: ClassVar[type[BitfloorConfig]] = BitfloorConfig
    tiers: ClassVar[None] = None

    def __init__(self, config: BitfloorConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._start = Gptq(config.start)

    @property
    def learnt_bytes(self) -> int:
        # as SignRound, and the latent weight; two moments, and the gradient of what they move
        return 21 + (12 if self.config.optimizer == "adamw" else 0)

    @property
    def needs(self) -> frozenset[Need]:
        needs = self._start.needs
        return needs | {Need.TARGETS, Need.GRADIENTS} if self.config.steps else needs

    def quantize_block(
        self,
        block: Block,
        inputs: Batches,
        specs: Mapping[str, QuantSpec],
        exact: Batches = (),
        targets: Batches = (),
    ) -> BlockResult:
        """See :class:`bitfloor.methods.base.Method`."""
        result = self._start.quantize_block(block, inputs, specs, exact)
        if not self.config.steps or not specs:
            return result
        began = time.perf_counter()
        config = self.config
        tall = units(block, specs)
        learnt, parts = {}, {}
        for unit, names in tall.items():
            spec = specs[names[0]]
            starts = [codes_and_grids(result.weights[name], spec) for name in names]

            def refined(weight: Tensor, _: QuantSpec, index: int, starts: list[list[Rounded]] = starts) -> Learnable:
                adam = AdamW() if config.optimizer == "adamw" else None
                codes, grid = stack([start[index] for start in starts])
                return Refinement(weight, codes, grid, zero_share=config.zero_share, adam=adam)

            learnt[unit], parts[unit] = learnable(basis_of(spec).to(block.weight(unit)), spec, refined)
        schedule = Schedule(config.steps, config.rate, SCALE_SHARE * config.rate, seed=self.seed)
        outcome = learn_block(block, inputs, targets, learnt, schedule, Objective(config.suppress))
        seconds = (time.perf_counter() - began) / len(specs)
        result.learning = learning_of(outcome)
        rounded = split(tall, outcome.best, parts)
        for index, name in enumerate(specs):
            codes, grid = rounded[name]
            result.weights[name] = pack(codes, grid, basis_of(specs[name]))
            before = result.reports[name]
            notes = [note for note in (before.note, outcome.note if index == 0 else None) if note]
            # The codes have moved: what the start said of this matrix's own output no longer holds.
            result.reports[name] = replace(
                before, output_error=None, seconds=before.seconds + seconds, note="; ".join(notes) or None
            )
        trim_heap()
        return result


def codes_and_grids(weight: PackedWeight, spec: QuantSpec) -> list[Rounded]:
    """Codes ``[O, K]`` uint8 and grid of every segment of a matrix, as it was packed."""
    found = []
    for segment in weight.segments:
        scale = segment.scale.float()
        zero, offset = segment.zero, None
        if segment.offset is not None:
            zero, offset = None, segment.offset.float()
        elif not isinstance(zero, Tensor):
            zero = torch.full_like(scale, float(segment.zero or 0))
        widths = torch.full((scale.shape[1],), segment.bits, dtype=torch.int64, device=scale.device)
        grid = Grid(
            scale,
            None if zero is None else zero.float(),
            offset,
            widths,
            segment.group_size,
            constant_zero=spec.symmetric and offset is None,
            scale_dtype=getattr(torch, spec.scale_dtype),
        )
        found.append((segment_codes(segment, weight.shape[0]), grid))
    return found

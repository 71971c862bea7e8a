"""SignRound (arXiv 2309.05516) over a block: all its matrices learn together, against the float model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bitfloor.core.affine import encode
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, Need
from bitfloor.methods.learning import learn_matrices
from bitfloor.methods.options import SignroundConfig
from bitfloor.solvers.block_opt import Learnable, Schedule
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.refine import Refinement
from bitfloor.solvers.signround import SignRound


class Signround:
    """Learned rounding and clipping by signed gradient descent.

    The quantized block sees what the quantized model feeds it and aims at the float model's output (section 3.3 of the
    paper; its code calls it "quantized input").

    Deviations: a mini-batch is one of the run's batches, so which sequences meet in it stays the same from pass to
    pass, only their order changes; and the best step is chosen on fixed batches. One-bit groups, which the paper does
    not have, start at their mean plus and minus the mean distance from it.
    """

    name: ClassVar[str] = "signround"
    paper: ClassVar[str] = "SignRound, arXiv 2309.05516"
    summary: ClassVar[str] = "rounding and ranges learned by signed gradient descent, block by block; an hour per model"
    Config: ClassVar[type[SignroundConfig]] = SignroundConfig
    tiers: ClassVar[None] = None
    # shift, fake-quantized weight, its gradient, what that is summed from; code of the best step
    learnt_bytes: ClassVar[int] = 17

    def __init__(self, config: SignroundConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.INPUTS, Need.TARGETS, Need.GRADIENTS})

    def quantize_block(
        self,
        block: Block,
        inputs: Batches,
        specs: Mapping[str, QuantSpec],
        exact: Batches = (),
        targets: Batches = (),
    ) -> BlockResult:
        """See :class:`bitfloor.methods.base.Method`."""
        config = self.config
        schedule = Schedule(
            steps=config.steps,
            rate=config.rate,
            range_rate=config.range_rate,
            accumulate=config.accumulate,
            check_every=config.check_every,
            patience=config.patience,
            seed=self.seed,
        )
        return learn_matrices(block, inputs, targets, specs, self._learnable, schedule)

    def _learnable(self, weight: Tensor, spec: QuantSpec, _: int) -> Learnable:
        """Groups of one width: as published, or with levels of their own where one bit leaves no range to clip."""
        if spec.bits > 1:
            return SignRound(weight, spec, tune_range=self.config.ranges)
        grid = minmax_grid(weight, spec)
        return Refinement(weight, encode(weight, grid), grid, tune_scale=self.config.ranges)

"""OmniQuant's learnable weight clipping (arXiv 2308.13137) over a block: all its ranges learn together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, Need
from bitfloor.methods.learning import Objective, learn_matrices
from bitfloor.methods.options import OmniquantConfig
from bitfloor.solvers.block_opt import Learnable, Schedule
from bitfloor.solvers.clipping import Clipping, Spread


class Omniquant:
    """Learned clipping: two numbers a group, rounding to nearest on what they leave of its range.

    With widths by group it is the second half of SliM-LLM+ (arXiv 2405.14917).

    Deviations: no equivalent transformation (the published weight-only runs of Llama and SliM-LLM+ have none either);
    the best step, chosen on fixed batches, is kept, not the last one; batches come in random order; the last position
    of a sequence is not compared. Those of the grids are in :mod:`bitfloor.solvers.clipping`.
    """

    name: ClassVar[str] = "omniquant"
    paper: ClassVar[str] = "OmniQuant, arXiv 2308.13137; SliM-LLM, arXiv 2405.14917"
    summary: ClassVar[str] = "ranges learned by gradients, block by block, codes to nearest; an hour per model"
    Config: ClassVar[type[OmniquantConfig]] = OmniquantConfig
    tiers: ClassVar[None] = None
    # fake-quantized weight, its gradient, what that is summed from; code of the best step; and of a group its range,
    # logits, their moments and the best grid: 40 bytes, less than one a weight in groups of more than 40 columns
    learnt_bytes: ClassVar[int] = 14

    def __init__(self, config: OmniquantConfig, seed: int = 0) -> None:
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
            accumulate=config.accumulate,
            check_every=config.check_every,
            patience=config.patience,
            seed=self.seed,
            decay=config.decay,
        )
        return learn_matrices(block, inputs, targets, specs, clipped, schedule, Objective(both=config.both))


def clipped(weight: Tensor, spec: QuantSpec, _: int = 0) -> Learnable:
    """What learns the groups of one width."""
    return Clipping(weight, spec) if spec.bits > 1 else Spread(weight, spec)

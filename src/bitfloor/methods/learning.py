"""Learning a block's matrices together against the float model's output: what methods with gradients share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfloor.methods.base import Batches, Block
from bitfloor.solvers.block_opt import Learnable, Outcome, Schedule, optimise


def learn_block(
    block: Block,
    inputs: Batches,
    exact: Batches,
    learnables: Mapping[str, Learnable],
    schedule: Schedule,
    fixed_batches: int,
) -> Outcome:
    """Learn all matrices of a block at once; snapshots of the best step.

    The quantized block sees what the quantized model feeds it, ``inputs``; its output is compared with the float
    block's on what the float model feeds that, ``exact``. The last position of a sequence predicts nothing and is not
    compared.

    Args:
        block: the float block.
        inputs, exact: its inputs in both models, batch by batch the same tokens.
        learnables: by matrix name; the other matrices stay float.
        schedule: how to learn.
        fixed_batches: how many batches, spread over the text, decide which step is best.
    """
    with torch.no_grad():
        targets = [block.forward(x, batch) for batch, x in enumerate(exact)]

    def loss(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        difference = block.forward(inputs[batch], batch, weights) - targets[batch]
        return difference[:, :-1].square().mean()

    every = range(len(inputs))
    return optimise(learnables, loss, every, spread(every, fixed_batches), schedule)


def spread(batches: range, count: int) -> list[int]:
    """Some of the batches, evenly spaced; all of them when they are fewer."""
    count = min(count, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]

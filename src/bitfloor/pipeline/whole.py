"""The float model from its tokens to its last hidden states, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import Call, capture
from bitfloor.calib.streams import Stream
from bitfloor.modeling.loader import SourceModel


@torch.no_grad()
def last_states(
    source: SourceModel, batches: Sequence[Tensor], states: Stream, products: torch.dtype, device: str
) -> list[list[Call]]:
    """Lead the text through all blocks.

    Args:
        source: the float model, its outer modules loaded.
        batches: token ids ``[B, T]``, on the device.
        states: an empty stream; what leaves the last block is in it afterwards.
        products: type in which the blocks' matrices are multiplied.
        device: where blocks are computed.

    Returns:
        what every block is called with besides the hidden state.
    """
    calls = capture(source.skeleton, source.map.blocks_path, batches, states).calls
    for k in range(source.map.n_blocks):
        path, matrices = source.map.block_path(k), source.map.block_matrices(k)
        runner = BlockRunner(source.load_block(k, device), path, matrices, calls[k], products)
        for i in range(len(states)):
            states[i] = runner.forward(states[i], i)
        source.release_block(k)
    return calls

"""Is a model, run block by block, still the same model? Asked of the model itself, to the last bit."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import capture, run_tail
from bitfloor.core.errors import InputError


class ReplaySource(Protocol):
    """What `verify_replay` needs of a model source; ``bitfloor.modeling.loader.SourceModel`` is one."""

    skeleton: Any
    map: Any

    def load_outer(self, device: str | torch.device = "cpu") -> None: ...

    def release_outer(self) -> None: ...

    def load_block(self, k: int, device: str | torch.device = "cpu") -> nn.Module: ...

    def release_block(self, k: int) -> None: ...


def verify_replay(source: ReplaySource, batch: Tensor) -> None:
    """Compare the model's own forward with its blocks chained from captured inputs, in float32, on the CPU.

    `capture` refuses by structure, without any block weights, every model whose arguments depend on earlier blocks,
    whose blocks are not chained directly, or that hands a writable container from block to block. What is left is
    data passed through module attributes; only running both ways shows it. This needs the whole model in memory, so
    it is for small models and for trying out a new architecture.

    Args:
        source: an open model; left without weights.
        batch: token ids int64 ``[B, T]``; a few tokens are enough.

    Raises:
        InputError: the two differ, by how much.
    """
    path, n = source.map.blocks_path, source.map.n_blocks
    try:
        source.load_outer()
        runs = capture(source.skeleton, path, [batch])
        blocks = [source.load_block(k) for k in range(n)]
        with torch.no_grad():
            expected = source.skeleton(input_ids=batch, use_cache=False).logits
            hidden = runs.hidden[0]
            for k, block in enumerate(blocks):
                refs = source.map.block_matrices(k)
                hidden = BlockRunner(block, f"{path}.{k}", refs, runs.calls[k]).forward(hidden, 0)
        logits = run_tail(source.skeleton, path, batch, hidden)
    finally:
        for k in range(n):
            source.release_block(k)
        source.release_outer()
    gap = float((logits - expected).abs().max())
    if gap != 0.0:
        raise InputError(
            f"{type(source.skeleton).__name__} run block by block differs from its own forward by "
            f"{gap:.3g}; its blocks share "
            "data bitfloor cannot see, so it is not supported."
        )

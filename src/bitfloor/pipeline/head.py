"""A head rounded towards the logits it makes, rather than towards its own numbers.

A head is a matrix like others: what counts is ``W h`` for the hidden states ``h`` that reach it, and those are far from
equally long in all directions. So its rows can be rounded as GPTQ rounds a layer, against ``H = sum_t h_t h_t^T``. One
forward pass of the float model, block by block, gives ``H``; it needs some tokens a channel and no more.

Where the head is the embedding too, its rows are also looked up, and there every direction counts. The same damping
that makes ``H`` invertible says so: ``H + a mean(diag H) I`` weighs an error by what it does to logits and, by ``a``,
by its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitfloor.calib.stats import HessianSum
from bitfloor.calib.streams import Stream
from bitfloor.core.affine import Grid
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.gptq import Shown, solve
from bitfloor.methods.options import GptqConfig
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.ends import Rounding
from bitfloor.pipeline.student import Head, gives_tuple
from bitfloor.pipeline.whole import last_states

TOKENS_A_CHANNEL = 16  # more say nothing new about H
LOOKED_UP = 0.1  # a, for a head that is the embedding
HEAD_ALONE = 0.01
IMPORTANCE, SWEEPS = 0.5, 2


def head_rounding(shown: Shown, *, tied: bool) -> Rounding:
    """GPTQ and coordinate descent for rows of a head, which do not depend on each other.

    Args:
        shown: what reached the head.
        tied: its rows are the embedding's too.
    """
    damping = LOOKED_UP if tied else HEAD_ALONE
    config = GptqConfig(static_groups=False, importance=IMPORTANCE, damping=damping, sweeps=SWEEPS)

    def rounding(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Grid, str | None]:
        solved, note = solve(rows, shown, spec, config)
        return solved.codes, solved.grid, note

    return rounding


@torch.no_grad()
def shown_to_head(
    source: SourceModel, batches: Sequence[Tensor], products: torch.dtype, device: str, spill: Path | None = None
) -> Shown:
    """``H`` and the number of tokens in it, from a forward pass of the float model.

    Args:
        source: the float model.
        batches: calibration tokens ``[B, T]``; only as many as are needed are read.
        products: type in which the blocks' matrices are multiplied.
        device: where blocks are computed.
        spill: folder for hidden states, None to hold them in memory.
    """
    own = enough(source, [batch.to(device) for batch in batches])
    states = Stream(folder=None if spill is None else spill / "head")
    source.load_outer(device)
    try:
        last_states(source, own, states, products, device)
        return shown_states(source, own, (state.to(device) for state in states), products, device)
    finally:
        states.close()
        source.release_outer()


def shown_states(
    source: SourceModel, rows: Sequence[Tensor], hidden: Iterable[Tensor], products: torch.dtype, device: str
) -> Shown:
    """The same from token ids and what left the last block; the outer modules are loaded."""
    head = Head(source, products, as_tuple=gives_tuple(source, rows[0], device))
    total: HessianSum | None = None
    for ids, state in zip(rows, hidden, strict=True):
        x = head.inputs(ids, state).flatten(0, -2)
        total = HessianSum(x.shape[-1], x.device) if total is None else total
        total.add(x)
    assert total is not None
    return Shown(total.total, None, total.rows)


def enough(source: SourceModel, batches: Sequence[Tensor]) -> list[Tensor]:
    """The first batches that hold as many tokens as ``H`` needs; all, if they hold fewer."""
    wanted = TOKENS_A_CHANNEL * int(source.config.get_text_config().hidden_size)
    found: list[Tensor] = []
    for batch in batches:
        if sum(own.numel() for own in found) >= wanted:
            break
        found.append(batch)
    return found

"""What a running quantization tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Args:
        kind: ``"start"``, ``"stage"``, ``"block"`` (is finished), ``"window"`` (is scored) or ``"note"``.
        block: index of the block, where there is one.
        blocks: number of blocks of the model.
        loss: relative squared error of the block's output, quantized stream against float stream.
        seconds: since the run began.
        eta: seconds still expected, None while unknown.
        message: a sentence for people.
    """

    kind: str
    block: int | None = None
    blocks: int = 0
    loss: float | None = None
    seconds: float = 0.0
    eta: float | None = None
    message: str = ""


Progress = Callable[[Event], None]


def silent(_: Event) -> None:
    """The watcher that looks away."""

"""What a model can score: its context length and its vocabulary, checked before any forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.modeling.context import context_length, text_config


def check_windows(model: Any, windows: Tensor) -> None:
    """Refuse windows the model cannot score.

    Args:
        model: a causal language model of transformers.
        windows: int64 ``[W, T]``.

    Raises:
        InputError: no window, a window of fewer than two tokens, one longer than the context, or a token id outside the
            vocabulary (the text was tokenised for another model).
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(f"Windows of shape {tuple(windows.shape)} cannot be scored; use [W >= 1, T >= 2].")
    length = context_length(model)
    if length is not None and windows.shape[1] > length:
        raise InputError(
            f"seqlen = {windows.shape[1]:,} is longer than this model's context of {length:,} tokens; use at most that "
            "(--seqlen)."
        )
    vocabulary = getattr(text_config(model), "vocab_size", None)
    highest, lowest = int(windows.max()), int(windows.min())
    if lowest < 0 or (isinstance(vocabulary, int) and highest >= vocabulary):
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"Token id {wrong} is outside this model's vocabulary of {vocabulary} tokens; "
            "tokenise the text with the model's own tokenizer."
        )

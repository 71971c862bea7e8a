"""A decoder of ours for packed models: a native call a token, with a cache of a fixed size.

Transformers' own forward calls some seventy small operators a layer, which takes longer than the packed products of a
small model. This runs the same layers in one native call. See docs/decisions/0020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.ops import packed_native
from bitfloor.ops.backend import INT8, REFERENCE, activations, backend
from bitfloor.ops.decoder_native import DecoderLibrary, DecoderParts
from bitfloor.runtime.native_parts import NotNative, read_model

MOST_POSITIONS = 1 << 26  # as in csrc/packed/decoder.h


def why_not(model: Any, max_length: int = 1) -> str | None:
    """Why the native step cannot run a model, a clause; None if it can.

    Args:
        model: a causal language model of transformers.
        max_length: most tokens that it is to hold.
    """
    if max_length > MOST_POSITIONS:
        return f"it holds {MOST_POSITIONS:,} tokens at most, not {max_length:,}"
    found = _read(model)
    return found if isinstance(found, str) else None


def _read(model: Any) -> DecoderParts | str:
    if backend() == REFERENCE:
        return "the reference was asked for"
    loaded = packed_native.load()
    if loaded.library is None:
        return f"there are no packed kernels: {loaded.reason}"
    try:
        return read_model(model)
    except NotNative as reason:
        return str(reason)


class NativeDecoder:
    """One sequence: its cache, and the logits of what comes next.

    The model's matrices are read where they lie; only norms and biases are copied. Everything is computed in float32,
    whatever the dtype of the model's activations, with inputs rounded to int8 where that is asked for
    (:mod:`bitfloor.ops.backend`). One thread at a time may use it.

    Args:
        model: one that :func:`why_not` has nothing against.
        max_length: most tokens that it holds. Memory for keys and values is taken as they come.

    Raises:
        InputError: another model, or no room for a token.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        if not 1 <= max_length <= MOST_POSITIONS:
            raise InputError(f"a context of {max_length} tokens cannot be held; use 1 to {MOST_POSITIONS}.")
        parts = _read(model)
        if isinstance(parts, str):
            raise InputError(f"The native step cannot run this model: {parts}; use transformers.")
        library = packed_native.load().library
        assert library is not None
        self.context: int | None = max_length
        self.length = 0
        self._decoder = DecoderLibrary(library, parts, max_length)

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Append tokens.

        Args:
            ids: at least one.

        Returns:
            Logits ``[V]`` float32 behind the last of them.

        Raises:
            InputError: none, too many, or one outside the vocabulary.
        """
        tokens, room = [int(token) for token in ids], (self.context or 0) - self.length
        if not tokens:
            raise InputError("There are no tokens to read; give at least one.")
        if len(tokens) > room:
            raise InputError(
                f"{len(tokens):,} more tokens do not fit: the context holds {self.context:,} and has "
                f"{self.length:,} already; shorten the text."
            )
        for token in tokens:
            if not 0 <= token < self._decoder.vocabulary:
                raise InputError(
                    f"Token id {token} is outside this model's vocabulary of {self._decoder.vocabulary:,} tokens; "
                    "tokenise the text with the model's own tokenizer."
                )
        logits = self._decoder.run(tokens, self.length, activations() == INT8)
        self.length += len(tokens)
        return logits

    def step(self, token: int) -> Tensor:
        """Append one token; see :meth:`prefill`."""
        return self.prefill((token,))

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on.

        Raises:
            InputError: there are not as many.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"The first {length} of {self.length} tokens cannot be kept; give 0 to {self.length}.")
        self.length = length

"""One sequence that grows token by token: a cache, and the logits of what comes next.

Whoever makes text (``generate``, ``chat``, ``serve``) asks a :class:`Decoder` and does not know what computes behind
it: transformers' forward and its cache, for any model, or a native step for the common shapes, for speed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bitfloor.core.errors import InputError
from bitfloor.modeling.context import context_length
from bitfloor.ops.backend import REFERENCE, backend

NATIVE = "bitfloor.runtime.native_step"  # has `why_not(model, max_length)` and `NativeDecoder(model, max_length)`


class Decoder(Protocol):
    """One sequence: its cache, and the logits of what comes next."""

    @property
    def context(self) -> int | None:
        """Most tokens it can hold, None: no limit known."""
        ...

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Append tokens (at least one); float32 logits ``[V]`` after the last of them."""
        ...

    def step(self, token: int) -> Tensor:
        """Append one token; float32 logits ``[V]`` after it. They may be overwritten by the next call."""
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on, so that what follows can share the ones before."""
        ...


class TransformersDecoder:
    """A :class:`Decoder` over any causal language model of transformers, with the cache that the model itself uses.

    A cache that cannot be cut (a sliding window that has slid, a recurrent state) is computed again from the tokens
    when something is appended after :meth:`truncate`. A model without a cache of the usual kind is run over the whole
    sequence at every step. Positions whose angles depend on how long the sequence is (:class:`MovingAngles`) are
    computed again, all of them, when they change.

    Args:
        model: on its device, in evaluation mode.
        max_length: most tokens to hold; None for the model's own context.
    """

    def __init__(self, model: Any, max_length: int | None = None) -> None:
        self.context = _bound(model, max_length)
        self._model = model
        self._device = next(iter([*model.parameters(), *model.buffers()])).device
        accepted = inspect.signature(model.forward).parameters
        self._caches = "past_key_values" in accepted and model._supports_default_dynamic_cache()
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._angles = MovingAngles.of(model)
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """See :class:`Decoder`.

        Raises:
            InputError: no tokens, or more than the context holds.
        """
        if not ids:
            raise InputError("there are no tokens to append; give at least one.")
        if self.context is not None and self.length + len(ids) > self.context:
            raise InputError(
                f"{self.length:,} tokens and {len(ids):,} more do not fit in a context of {self.context:,}; "
                "shorten the text."
            )
        cache, self._cache = self._cache, None  # until it is whole again: an interruption leaves it half appended
        if cache is None or self._angles.change(self.length, self.length + len(ids)):
            fed = [*self._ids, *ids]
            cache = DynamicCache(config=self._model.config) if self._caches else None
        else:
            fed = list(ids)
        logits = self._forward(fed, self.length + len(ids), cache)
        self._ids.extend(ids)
        self._cache = cache
        return logits

    def step(self, token: int) -> Tensor:
        """See :class:`Decoder`."""
        return self.prefill((token,))

    def truncate(self, length: int) -> None:
        """See :class:`Decoder`.

        Raises:
            InputError: a length that is negative or longer than the sequence.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"a sequence of {self.length:,} tokens cannot be cut to {length:,}.")
        removed = self.length - length
        if not removed:
            return
        moved = self._angles.change_back(length, len(self._ids))
        self._ids = self._ids[:length]
        if self._cache is not None and length and not moved and all(map(_can_be_cut, self._cache.layers)):
            self._cache.crop(-removed)
        else:
            self._cache = None

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int], length: int, cache: DynamicCache | None) -> Tensor:
        out = self._model(
            input_ids=torch.tensor([list(ids)], device=self._device),
            attention_mask=torch.ones(1, length, dtype=torch.int64, device=self._device),
            use_cache=cache is not None,
            **({} if cache is None else {"past_key_values": cache}),
            **self._options,
        )
        logits: Tensor = out.logits[0, -1].float()
        return logits


@dataclass(frozen=True)
class MovingAngles:
    """Rotary positions that depend on the length of the whole sequence: keys of a shorter one do not fit a longer one.

    With ``longrope`` there are two sets, one for sequences up to the length the model was first trained on and one for
    longer ones; with ``dynamic`` every length beyond it has its own. transformers' ``generate`` reads a prompt whole,
    and so gives all of it one set; with ``longrope`` it reads everything again where the second set begins.

    Args:
        kind: ``"longrope"``, ``"dynamic"``, or None for positions that do not depend on it.
        limit: the length up to which nothing moves.
    """

    kind: str | None
    limit: int = 0

    @classmethod
    def of(cls, model: Any) -> MovingAngles:
        """Those of a model, from its configuration."""
        config = model.config.get_text_config()
        found = getattr(config, "rope_parameters", None) or {}
        for rope in (found, *(value for value in found.values() if isinstance(value, dict))):
            kind = rope.get("rope_type")
            if kind == "longrope":
                own = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
                return cls(kind, int(rope.get("original_max_position_embeddings") or own))
            if kind == "dynamic":
                return cls(kind, int(config.max_position_embeddings))
        return cls(None)

    def change(self, held: int, length: int) -> bool:
        """Whether what is held does not fit when several tokens are appended, up to ``length``."""
        if self.kind is None or not held or length <= self.limit:
            return False
        return held <= self.limit if self.kind == "longrope" else length > held + 1

    def change_back(self, length: int, held: int) -> bool:
        """Whether what is held does not fit when it is cut to ``length``."""
        if self.kind is None or held <= self.limit:
            return False
        return length <= self.limit or self.kind == "dynamic"


def _bound(model: Any, max_length: int | None) -> int | None:
    """Most tokens of a sequence: the least of what is asked for and what the model was made for."""
    return min((length for length in (context_length(model), max_length) if length is not None), default=None)


def _can_be_cut(layer: Any) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.get_seq_length() < layer.sliding_window)
    return type(layer) is DynamicLayer


def open_decoder(model: Any, max_length: int | None = None) -> Decoder:
    """A new, empty sequence over a model, by the fastest means that this installation has for it.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        max_length: most tokens the sequence will hold; None for the model's context.
    """
    bound = _bound(model, max_length)
    if bound is not None and backend() != REFERENCE and find_spec(NATIVE) is not None:
        native = import_module(NATIVE)
        if native.why_not(model, bound) is None:
            decoder: Decoder = native.NativeDecoder(model, bound)
            return decoder
    return TransformersDecoder(model, max_length)

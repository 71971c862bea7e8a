"""The decode loop: tokens, and their text, one after another, until something ends them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.runtime.decode import Decoder
from bitfloor.runtime.detokenize import StopStrings, TextStream
from bitfloor.runtime.sampling import Sampler, Settings

PIECE = 512  # tokens of a prompt at a time: what a long one needs of memory, and how soon it can be given up

Ending = Literal["end", "length", "context", "stop", "cancelled"]
Cancelled = Callable[[], bool]


def never() -> bool:
    """Nothing cancels."""
    return False


@dataclass(frozen=True)
class Piece:
    """A part of a text that is being made; there is one for every token.

    Args:
        text: certain from now on; may be empty.
        new_tokens: tokens made so far, an end token included.
        ended: None while there is more to come; ``"end"`` (the model ended the text), ``"length"`` (max_new_tokens
            reached), ``"context"`` (the model's context is full), ``"stop"`` (a stop string) or ``"cancelled"``.
    """

    text: str
    new_tokens: int
    ended: Ending | None = None


class Tape:
    """A decoder and the tokens it holds, so that a text which begins like the last one is not read again.

    Args:
        decoder: empty.
        computing: makes the context that the decoder is called in (which backend computes); it is entered for every
            call, so that nothing of it is seen by whoever consumes a stream.
    """

    def __init__(self, decoder: Decoder, computing: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.decoder = decoder
        self.ids: list[int] = []
        self._computing = computing

    @property
    def context(self) -> int | None:
        """Most tokens it can hold."""
        return self.decoder.context

    def read(self, ids: Sequence[int], cancelled: Cancelled = never) -> Tensor | None:
        """Hold exactly these tokens; logits after the last of them, or None when cancelled on the way.

        Args:
            ids: at least one.
            cancelled: asked before every piece.
        """
        del self.ids[self.decoder.length :]  # an interrupted call may have left one of them behind
        shared = min(_shared(self.ids, ids), len(ids) - 1)  # the last token is read again, for its logits
        with self._computing():
            self.decoder.truncate(shared)
        del self.ids[shared:]
        logits = None
        for start in range(shared, len(ids), PIECE):
            if cancelled():
                return None
            piece = ids[start : start + PIECE]
            with self._computing():
                logits = self.decoder.prefill(piece)
            self.ids.extend(piece)
        return logits

    def step(self, token: int) -> Tensor:
        """Append a token; logits after it."""
        with self._computing():
            logits = self.decoder.step(token)
        self.ids.append(token)
        return logits


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def check_room(prompt: int, context: int | None) -> None:
    """Refuse a prompt that leaves no room for a new token.

    Raises:
        InputError: there is none.
    """
    if context is not None and prompt >= context:
        raise InputError(
            f"The prompt has {prompt:,} tokens and the model's context holds {context:,}, so there is no room for a "
            "new one; shorten the prompt."
        )


def stream_tokens(
    tape: Tape, ids: Sequence[int], settings: Settings, ends: Sequence[int] = (), cancelled: Cancelled = never
) -> Generator[int, None, Ending]:
    """Tokens that follow a prompt, as they are made; an end token is the last one if it comes.

    Args:
        tape: what computes; it holds the prompt and the new tokens but the last when this is over.
        ids: the prompt, at least one token.
        settings: how to choose; ``stop`` is not looked at here.
        ends: tokens that end the text.
        cancelled: asked between tokens, and between pieces of the prompt.

    Returns:
        Why there are no more.

    Raises:
        InputError: the prompt fills the context.
        BitfloorError: the model gives logits that are not finite.
    """
    check_room(len(ids), tape.context)
    room = None if tape.context is None else tape.context - len(ids)
    limits = [limit for limit in (room, settings.max_new_tokens) if limit is not None]
    count = min(limits, default=None)
    sampler = Sampler(settings)
    logits = tape.read(ids, cancelled)
    made = 0
    while logits is not None and not cancelled():
        token = sampler.choose(logits)
        made += 1
        yield token
        if token in ends:
            return "end"
        if made == count:
            return "length" if count == settings.max_new_tokens else "context"
        if cancelled():
            break
        logits = tape.step(token)
    return "cancelled"


def stream_text(
    tape: Tape,
    tokenizer: Any,
    ids: Sequence[int],
    settings: Settings,
    ends: Sequence[int] = (),
    cancelled: Cancelled = never,
) -> Iterator[Piece]:
    """The text that follows a prompt, as it is made. The last piece, and only that one, says why it ended.

    Args:
        tape, ids, settings, ends, cancelled: see :func:`stream_tokens`.
        tokenizer: of transformers.

    Raises:
        InputError: the prompt fills the context.
        BitfloorError: the model gives logits that are not finite.
    """
    text, stops = TextStream(tokenizer, ids), StopStrings(settings.stop)
    tokens = stream_tokens(tape, ids, settings, ends, cancelled)
    made = 0
    while True:
        try:
            token = next(tokens)
        except StopIteration as over:
            last = stops.push(text.flush())
            yield Piece(last + stops.flush(), made, "stop" if stops.found else over.value)
            return
        made += 1
        certain = "" if token in ends else stops.push(text.push(token))
        if stops.found:
            tokens.close()
            yield Piece(certain, made, "stop")
            return
        yield Piece(certain, made)

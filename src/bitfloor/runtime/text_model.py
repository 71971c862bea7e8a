"""A model that makes text: the weights, the tokenizer and one sequence in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.modeling.context import context_length, text_config
from bitfloor.runtime.decode import open_decoder
from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.stream import Cancelled, Ending, Piece, Tape, check_room, never, stream_text

Message = Mapping[str, str]


@dataclass(frozen=True)
class Generation:
    """What came out.

    Args:
        text: the new text only, special tokens left out.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens made.
        stopped: why it ended, see :class:`bitfloor.runtime.stream.Piece`.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    stopped: Ending


class TextModel:
    """A causal language model and its tokenizer, making one text at a time.

    The tokens of the last text stay in its cache: one that begins with them (the next turn of a conversation) is read
    from where it differs. Not for several threads at once.

    Args:
        model: a causal language model of transformers, on its device; it is put into evaluation mode.
        tokenizer: its tokenizer.
        context: most tokens, prompt and text together; None for what the model was made for.
        computing: makes the context that every step is computed in, see :mod:`bitfloor.ops.backend`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        context: int | None = None,
        computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._model = model.eval()
        self._computing = computing
        self.context = context_length(model)
        if context is not None:
            self.limit(context)
        self.tokenizer = tokenizer
        self.ends = _end_tokens(model, tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether it can be sent messages."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def limit(self, context: int) -> None:
        """Hold at most so many tokens; must be said before the first text.

        Raises:
            InputError: fewer than two, a prompt and a new one.
        """
        if context < 2:
            raise InputError(f"a context of {context} tokens has no room for a prompt and a new token; use more.")
        self.context = context if self.context is None else min(context, self.context)

    def encode(self, prompt: str) -> list[int]:
        """Tokens of a text to continue; an empty one gives the model's start token.

        Raises:
            InputError: an empty prompt for a model without a start token, or one that is no text.
        """
        ids = self._tokens(prompt, special=True)
        if ids:
            return ids
        for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self._model.config.bos_token_id):
            if start is not None:
                return [int(start)]
        raise InputError("The prompt is empty and this model has no start token; give at least one word.")

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation by the tokenizer's chat template, up to where the next answer begins.

        Args:
            messages: with ``role`` and ``content``.

        Raises:
            InputError: no template, or one that refuses these messages.
        """
        if not self.has_chat_template:
            raise InputError("This model's tokenizer has no chat template; generate without it.")
        given = [dict(message) for message in messages]
        try:
            text = self.tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs that come with the model, and raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
            raise InputError(f"The model's chat template refuses these messages: {reason}.") from error
        ids = self._tokens(text, special=False)
        if not ids:
            raise InputError("The model's chat template makes nothing of these messages; send at least one word.")
        return ids

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError("The text has half of a surrogate pair, which is no character; send it as UTF-8.")
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse tokens that are not this model's.

        Raises:
            InputError: none at all, or one outside the vocabulary.
        """
        if not ids:
            raise InputError("The prompt has no tokens; give at least one.")
        size = getattr(text_config(self._model), "vocab_size", None)
        for token in ids:
            if token < 0 or (size is not None and token >= size):
                raise InputError(f"Token id {token} is outside this model's vocabulary of {size} tokens.")

    def stream(
        self, ids: Sequence[int], settings: Settings | None = None, cancelled: Cancelled = never
    ) -> Iterator[Piece]:
        """The text that follows a prompt, as it is made.

        Args:
            ids: the prompt, from :meth:`encode` or :meth:`encode_chat`.
            settings: how to make it; greedy, 64 tokens by default.
            cancelled: asked between tokens; the text ends when it says yes.

        Raises:
            InputError: the prompt fills the context.
            BitfloorError: the model gives logits that are not finite.
        """
        return stream_text(self._tape, self.tokenizer, ids, settings or Settings(), self.ends, cancelled)

    @cached_property
    def _tape(self) -> Tape:
        with self._computing():
            return Tape(open_decoder(self._model, self.context), self._computing)


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: Settings | None = None,
    *,
    chat: bool = False,
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Generation:
    """Continue ``prompt``.

    The model's own sampling settings are not used, so that two models are compared on the same terms. The prompt is
    continued as it stands; no chat template is applied unless ``chat``.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        prompt: empty lets the model begin from its start token.
        settings: greedy, at most 64 tokens by default; fewer are made when the context is full or the model ends the
            text.
        chat: wrap the prompt as one user message by the tokenizer's chat template.
        computing: see :class:`TextModel`.

    Raises:
        InputError: a prompt that leaves no room in the context, an empty prompt for a model without a start token, or
            ``chat`` without a template.
        BitfloorError: the model gives logits that are not finite.
    """
    settings = settings or Settings()
    was_training = model.training
    try:
        talks = TextModel(model, tokenizer, computing=computing)
        ids = talks.encode_chat([{"role": "user", "content": prompt}]) if chat else talks.encode(prompt)
        check_room(len(ids), talks.context)
        if settings.max_new_tokens is not None:
            talks.limit(len(ids) + settings.max_new_tokens)  # no larger a cache than this text needs
        pieces = list(talks.stream(ids, settings))
    finally:
        model.train(was_training)
    last = pieces[-1]
    assert last.ended is not None
    return Generation("".join(piece.text for piece in pieces), len(ids), last.new_tokens, last.ended)


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The generation config's end tokens (a chat model may have several), else the tokenizer's.

    Raises:
        InputError: they are no token ids.
    """
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if declared is None:
        declared = tokenizer.eos_token_id
    if declared is None:
        return ()
    ends = tuple(declared) if isinstance(declared, (list, tuple)) else (declared,)
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise InputError(
            f"generation_config.json has eos_token_id = {declared!r}; put a token id there, or a list of them."
        )
    return ends

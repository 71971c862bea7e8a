"""A conversation with a model: what was said, and what of it still fits."""

from __future__ import annotations

from collections.abc import Iterator

from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.stream import Cancelled, Piece, check_room, never
from bitfloor.runtime.text_model import Message, TextModel

RESERVED = 4  # an answer is promised at least the context divided by this, or max_new_tokens if that is less


class Conversation:
    """Messages back and forth, by the model's chat template. The oldest turns are forgotten when the context is full.

    Args:
        model: it must have a chat template.
        system: what the model is told before everything, and always.

    Raises:
        InputError: no template, or one that refuses a system message.
    """

    def __init__(self, model: TextModel, system: str | None = None) -> None:
        self._model = model
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[tuple[str, str]] = []
        self.prompt_tokens = 0  # of the last answer
        model.encode_chat([*self._system, {"role": "user", "content": "Hello"}])

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def forget_for(self, text: str, settings: Settings) -> int:
        """Forget as many of the oldest turns as it takes to answer ``text``; how many these were.

        Raises:
            InputError: it leaves no room for an answer even alone; nothing is forgotten then.
        """
        context = self._model.context
        if context is None:
            return 0
        check_room(len(self._ids(text, len(self.turns))), context)
        reserved = context // RESERVED if settings.max_new_tokens is None else settings.max_new_tokens
        most = context - min(reserved, context // RESERVED)
        first = 0
        while first < len(self.turns) and len(self._ids(text, first)) > most:
            first += 1
        del self.turns[:first]
        return first

    def ask(self, text: str, settings: Settings, cancelled: Cancelled = never) -> Iterator[Piece]:
        """The answer, as it is made; it becomes part of the conversation, also when it is given up.

        Args:
            text: the user's message; call :meth:`forget_for` first.
            settings: how to answer.
            cancelled: asked between tokens.

        Raises:
            InputError: the template refuses the conversation, or it does not fit.
            BitfloorError: the model gives logits that are not finite.
        """
        ids = self._ids(text, 0)
        self.prompt_tokens = len(ids)
        answer = ""
        for piece in self._model.stream(ids, settings, cancelled):
            answer += piece.text
            if piece.ended is not None:
                self.turns.append((text, answer))
            yield piece

    def _ids(self, text: str, first: int) -> list[int]:
        messages = [*self._system]
        for question, answer in self.turns[first:]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._model.encode_chat([*messages, {"role": "user", "content": text}])

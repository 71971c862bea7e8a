"""Text from tokens as they come: no half characters, no lost spaces, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
CONTEXT = 16  # tokens before the new ones that are decoded with them
LONGEST = 4  # bytes of a character
PATIENCE = 32  # tokens after which broken bytes are no unfinished character but what the model wrote


class TextStream:
    """Turns the tokens that follow a prompt into text, piece by piece.

    A token's text depends on the tokens before it (some tokenizers drop the space that a decoded text begins with), and
    a character may be spread over several tokens. So new tokens are decoded together with a few before them, and held
    back while they end inside a character. Special tokens are left out.

    Args:
        tokenizer: of transformers.
        prompt: tokens that the text follows.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # Tokens whose text is out, in runs that end where a character ends: only there may what is decoded begin.
        self._runs = [self._end_of(prompt)]
        self._new: list[int] = []
        self._before = self._decode(self._runs[0])

    def push(self, token: int) -> str:
        """The text that is certain with this token; may be empty."""
        self._new.append(token)
        whole = self._decode(self._with_new())
        if whole.endswith(BROKEN) and len(self._new) < PATIENCE:
            return ""
        return self._take(whole)

    def flush(self) -> str:
        """What was held back when no more tokens come, without a character that was never finished."""
        if not self._new:
            return ""
        return self._take(self._decode(self._with_new())).rstrip(BROKEN)

    def _take(self, whole: str) -> str:
        text = whole[len(self._before) :]
        self._runs.append(self._new)
        self._new = []
        while sum(map(len, self._runs[1:])) >= CONTEXT:
            del self._runs[0]
        self._before = self._decode(self._with_new())
        return text

    def _with_new(self) -> list[int]:
        return [token for run in (*self._runs, self._new) for token in run]

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, a few more than usual where it would begin inside a character."""
        for count in range(CONTEXT, CONTEXT + LONGEST):
            end = list(prompt[-count:])
            if not self._decode(end).startswith(BROKEN):
                return end
        return list(prompt[-CONTEXT:])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Finds the first of some strings in text that comes in pieces; what could become one is held back.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain with this piece; once a string was found, what came before it, then nothing."""
        if self.found:
            return ""
        self._held += text
        places = [place for string in self._strings if (place := self._held.find(string)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        return self._release(len(self._held) - self._could_begin())

    def flush(self) -> str:
        """What was held back when no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _could_begin(self) -> int:
        """Length of the longest end of the text so far that some string begins with."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0

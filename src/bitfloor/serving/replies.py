"""Answers in the shapes of OpenAI's API, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from bitfloor.runtime.stream import Ending

FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}
DONE = b"data: [DONE]\n\n"


def as_json(content: Any) -> bytes:
    """A document as it is sent."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def as_event(content: Any) -> bytes:
    """A document as one event of a stream."""
    return b"data: " + as_json(content) + b"\n\n"


class Reply:
    """The documents of one answer.

    Args:
        chat: whether it answers a chat, or continues a prompt.
        model: name of the model.
        include_usage: whether a stream tells the numbers of tokens at its end.
    """

    def __init__(self, chat: bool, model: str, include_usage: bool = False) -> None:
        self._chat = chat
        self._usage = {"usage": None} if include_usage else {}
        kind = "chat.completion" if chat else "text_completion"
        name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._head: dict[str, Any] = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def whole(self, text: str, ended: Ending, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": FINISH[ended]}
        return {**self._head, "choices": [choice], "usage": usage(prompt_tokens, new_tokens)}

    def begin(self) -> dict[str, Any] | None:
        """The chunk before the first text, where there is one."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self._chat else None

    def part(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk({"content": text} if self._chat else text, None)

    def end(self, ended: Ending) -> dict[str, Any]:
        """The chunk that says why there is no more."""
        return self._chunk({} if self._chat else "", FINISH[ended])

    def usage(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The chunk with the numbers of tokens, for those who asked."""
        return {**self._chunk("", None), "choices": [], "usage": usage(prompt_tokens, new_tokens)}

    def _chunk(self, said: dict[str, Any] | str, reason: str | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        choice = {"index": 0, "delta" if self._chat else "text": said, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": kind, "choices": [choice], **self._usage}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def model_card(name: str, since: int) -> dict[str, Any]:
    """A model as ``/v1/models`` lists it."""
    return {"id": name, "object": "model", "created": since, "owned_by": "bitfloor"}

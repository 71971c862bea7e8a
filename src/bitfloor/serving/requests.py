"""What clients ask for, checked: every field is understood, or refused with a sentence. Nothing is ignored.

Fields that bitfloor does not have are accepted with a value that asks for nothing (``n: 1``, ``logprobs: false``),
because clients send those; so is ``user``, which asks for nothing whatever it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.runtime.sampling import SEEDS, Settings, fresh_seed
from bitfloor.runtime.text_model import Message
from bitfloor.serving.errors import ApiError, wrong

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS = 16
DEFAULT_TOKENS = 16  # of a completion, as OpenAI documents it; a chat answer may fill the context

COMMON = {
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "user",
}  # fmt: skip
CHAT = {*COMMON, "messages", "max_completion_tokens"}
COMPLETION = {*COMMON, "prompt"}
# Values that ask for nothing; null always does.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}


@dataclass(frozen=True)
class Ask:
    """A checked request.

    Args:
        chat: whether it is answered as a chat.
        prompt: messages, a text to continue, or tokens.
        settings: how to make the answer.
        stream: whether the answer is sent as it is made.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    chat: bool
    prompt: list[Message] | str | list[int]
    settings: Settings
    stream: bool
    include_usage: bool


def read_json(data: bytes) -> dict[str, Any]:
    """A body as an object.

    Raises:
        ApiError: it is none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        content = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # a decoding error is a ValueError too
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise wrong(None, f"The body is not JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise wrong(None, f"The body is a JSON {_name(content)} and must be an object.")
    return content


def parse_chat(content: Mapping[str, Any], model: str) -> Ask:
    """A request to ``/v1/chat/completions``.

    Args:
        content: the body.
        model: name of the model that is served.

    Raises:
        ApiError: what is wrong with it.
    """
    fields = _known(content, CHAT, model)
    most, other = _integer(fields, "max_completion_tokens", 1), _integer(fields, "max_tokens", 1)
    if most is not None and other is not None and most != other:
        raise wrong("max_tokens", f"max_tokens = {other} and max_completion_tokens = {most} differ; send one of them.")
    return _ask(fields, True, _messages(fields.get("messages")), most if other is None else other)


def parse_completion(content: Mapping[str, Any], model: str) -> Ask:
    """A request to ``/v1/completions``; see :func:`parse_chat`."""
    fields = _known(content, COMPLETION, model)
    most = _integer(fields, "max_tokens", 1)
    return _ask(fields, False, _prompt(fields.get("prompt")), DEFAULT_TOKENS if most is None else most)


def _known(content: Mapping[str, Any], known: set[str], model: str) -> dict[str, Any]:
    """The fields that say something, null being the same as not there."""
    fields = {name: value for name, value in content.items() if value is not None}
    for name in [name for name in fields if name not in known]:
        value = fields.pop(name)
        if name not in NEUTRAL:
            raise wrong(name, f"The field {name!r} is not supported; leave it out.", "unsupported_parameter")
        if not any(type(value) is type(other) and value == other for other in _alike(NEUTRAL[name])):
            allowed = " or ".join(json.dumps(other) for other in NEUTRAL[name])
            shown = json.dumps(value)
            shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
            message = f"{name} = {shown} is not supported; leave it out or send {allowed}."
            raise wrong(name, message, "unsupported_parameter")
    asked = fields.get("model")
    if not isinstance(asked, str):
        raise wrong("model", f"The field 'model' must name the model; this server has {model!r}.")
    if asked != model:
        message = f"The model {asked!r} does not exist here; this server has {model!r}."
        raise ApiError(404, message, param="model", code="model_not_found")
    return fields


def _alike(values: tuple[Any, ...]) -> list[Any]:
    """With the floats that equal whole numbers, which some clients send."""
    return [*values, *(float(value) for value in values if type(value) is int)]


def _ask(fields: Mapping[str, Any], chat: bool, prompt: Any, most: int | None) -> Ask:
    stream = _flag(fields, "stream")
    options = fields.get("stream_options", {})
    if "stream_options" in fields and not stream:
        raise wrong("stream_options", "stream_options are for streams; leave them out or send stream = true.")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", "stream_options must be an object with include_usage and nothing else.")
    if _flag({name: value for name, value in options.items() if value is not None}, "include_obfuscation"):
        raise wrong("stream_options", "include_obfuscation = true is not supported; leave it out.")
    usage = _flag({name: value for name, value in options.items() if value is not None}, "include_usage")
    seed = _integer(fields, "seed", None)
    try:
        settings = Settings(
            max_new_tokens=most,
            temperature=_number(fields, "temperature"),
            top_p=_number(fields, "top_p"),
            seed=fresh_seed() if seed is None else seed % SEEDS,
            stop=_stop(fields.get("stop")),
        )
    except InputError as error:
        named = next((name for name in ("temperature", "top_p", "stop") if name in str(error)), None)
        raise wrong(named, str(error)) from error
    return Ask(chat, prompt, settings, stream, usage)


def _integer(fields: Mapping[str, Any], name: str, least: int | None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)  # 3.0: some clients know one kind of number only
    if type(value) is not int:
        is_what = f"is {value}" if type(value) is float else f"is a JSON {_name(value)}"
        raise wrong(name, f"{name} must be a whole number and {is_what}.")
    if least is not None and value < least:
        raise wrong(name, f"{name} = {value} is too small; use at least {least}, or leave it out.")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name, 1.0)
    if type(value) not in (int, float):
        raise wrong(name, f"{name} must be a number and is a JSON {_name(value)}.")
    try:
        return float(value)
    except OverflowError as error:
        raise wrong(name, f"{name} is far too large a number.") from error


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise wrong(name, f"{name} must be true or false and is a JSON {_name(value)}.")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise wrong("stop", "stop must be a string or a list of strings.")
    if len(strings) > MOST_STOPS:
        raise wrong("stop", f"stop has {len(strings)} strings; send at most {MOST_STOPS}.")
    return tuple(strings)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", "messages must be a list of at least one message.")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise wrong(where, f"{where} must be an object with role and content and is a JSON {_name(message)}.")
    fields = {name: value for name, value in message.items() if value is not None and value != []}
    for name in fields:
        if name not in ("role", "content"):
            raise wrong(f"{where}.{name}", f"{where}.{name} is not supported; leave it out.", "unsupported_parameter")
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = json.dumps(role) if isinstance(role, str) else "missing or no string"
        raise wrong(f"{where}.role", f"{where}.role is {shown}; use one of {', '.join(ROLES)}.")
    return {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content")}


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(where, f"{where} must be a string or a list of text parts.")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(where, f'{where} may only have parts such as {{"type": "text", "text": "..."}}.')
        texts.append(part["text"])
    return "".join(texts)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    if isinstance(value, list) and len(value) > 1 and all(isinstance(entry, str | list) for entry in value):
        raise wrong("prompt", f"prompt has {len(value)} texts; send one request for each.", "unsupported_parameter")
    raise wrong("prompt", "prompt must be a string or a list of token ids.")


def _name(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")

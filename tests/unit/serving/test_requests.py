"""Every field of a request is understood or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from bitfloor.runtime.sampling import Settings
from bitfloor.serving.errors import ApiError
from bitfloor.serving.requests import Ask, parse_chat, parse_completion, read_json

HI = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
ONCE = {"model": "m", "prompt": "Once"}


def test_the_least_chat_and_what_is_assumed() -> None:
    ask = parse_chat(HI, "m")
    assert ask == Ask(True, [{"role": "user", "content": "Hi"}], ask.settings, False, False)
    assert ask.settings == Settings(None, 1.0, 1.0, ask.settings.seed)
    assert ask.settings.seed != parse_chat(HI, "m").settings.seed


def test_everything_that_can_be_asked() -> None:
    fields = {"max_tokens": 5, "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["a", "b"], "user": "me"}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    settings = Settings(5, 0.0, 0.5, 3, ("a", "b"))
    assert parse_completion({**ONCE, **fields, **streaming}, "m") == Ask(False, "Once", settings, True, True)
    assert parse_chat({**HI, **fields, "max_completion_tokens": 5}, "m").settings == settings
    assert parse_chat({**HI, "max_completion_tokens": 7}, "m").settings.max_new_tokens == 7
    assert parse_completion(ONCE, "m").settings.max_new_tokens == 16
    assert parse_completion({**ONCE, "stop": "x", "seed": -1}, "m").settings.stop == ("x",)


def test_messages_with_parts_and_what_clients_send_back() -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": ""},
    ]
    assert parse_chat({**HI, "messages": messages}, "m").prompt == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": ""},
    ]


def test_values_that_ask_for_nothing_are_let_through() -> None:
    nothing = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}}
    parse_chat({**HI, **nothing, "anything": None, "logit_bias": {}}, "m")
    parse_completion({**ONCE, "echo": False, "best_of": 1, "suffix": None}, "m")


def test_prompts_of_tokens_and_batches_of_one() -> None:
    for prompt, expected in ([["a"], "a"], [[1, 2], [1, 2]], [[[1, 2]], [1, 2]], ["", ""]):
        assert parse_completion({"model": "m", "prompt": prompt}, "m").prompt == expected


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"model": None}, "model", "must name the model"),
        ({"model": 3}, "model", "must name the model"),
        ({"n": 2}, "n", "n = 2 is not supported; leave it out or send 1."),
        ({"n": True}, "n", "n = true is not supported"),
        ({"logprobs": True}, "logprobs", "logprobs = true is not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty = 0.5 is not supported"),
        ({"wings": 2}, "wings", "'wings' is not supported"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens = -1 is too small"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0 is too small"),
        ({"max_tokens": "5"}, "max_tokens", "must be a whole number and is a JSON string"),
        ({"max_tokens": 5.5}, "max_tokens", "must be a whole number and is 5.5"),
        ({"max_tokens": True}, "max_tokens", "must be a whole number and is a JSON boolean"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"temperature": -1}, "temperature", "temperature = -1.0"),
        ({"temperature": 10**400}, "temperature", "far too large"),
        ({"top_p": 0}, "top_p", "top_p = 0.0"),
        ({"seed": 1.5}, "seed", "must be a whole number"),
        ({"stop": 3}, "stop", "a string or a list of strings"),
        ({"stop": [""]}, "stop", "empty stop string"),
        ({"stop": ["a"] * 17}, "stop", "17 strings"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "are for streams"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options", "include_usage and nothing else"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "Hi"}, "messages", "at least one message"),
        ({"messages": ["Hi"]}, "messages[0]", "must be an object"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role", '"tool"; use one of system'),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "may only have"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "me"}]}, "messages[0].name", "is not supported"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls", "not"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError, match=message.replace("[", r"\[")) as caught:
        parse_chat({**HI, **changes}, "m")
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("prompt", [None, 3, [], [1, "a"], [1.5], {"a": 1}, [True]])
def test_prompts_that_are_none(prompt: Any) -> None:
    with pytest.raises(ApiError, match="prompt must be"):
        parse_completion({"model": "m", "prompt": prompt}, "m")


def test_several_prompts_are_several_requests() -> None:
    with pytest.raises(ApiError, match="prompt has 2 texts"):
        parse_completion({"model": "m", "prompt": ["a", "b"]}, "m")


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError, match="'gpt' does not exist here; this server has 'm'") as caught:
        parse_chat({**HI, "model": "gpt"}, "m")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b'{"temperature": NaN}', "NaN is no JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"[1]", "is a JSON array and must be an object"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_bodies_that_are_no_objects(data: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        read_json(data)
    assert caught.value.status == 400


def test_an_error_object_is_short_and_typed() -> None:
    body = ApiError(400, "x" * 5000, param="n").body()["error"]
    assert len(body["message"]) == 1000 and body["type"] == "invalid_request_error" and body["param"] == "n"
    kinds = [ApiError(status, "").body()["error"]["type"] for status in (401, 429, 503)]
    assert kinds == ["authentication_error", "rate_limit_error", "server_error"]

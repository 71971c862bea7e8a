"""The server over real sockets, asked by OpenAI's own client and by clients that do not behave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from speaking import save_speaker

from bitfloor import api
from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.runtime.text_model import TextModel
from bitfloor.serving import app
from bitfloor.serving.server import Limits, Server, key_from, listen

NAME, CONTEXT = "speaker", 512
JSON = {"content-type": "application/json"}
HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("serving") / NAME, context=CONTEXT)


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return api.text_model(folder)


@contextmanager
def serving(model: TextModel, limits: Limits | None = None, api_key: str | None = None) -> Iterator[str]:
    """A server in a thread; its address."""
    address = listen("127.0.0.1", 0)
    server = Server(model, NAME, address, limits or Limits(), api_key)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield address.url
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(model: TextModel) -> Iterator[str]:
    with serving(model, Limits(body=20_000)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def slow(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every step takes 10 ms; the tokens that were stepped over."""
    steps: list[int] = []
    step = model._tape.decoder.step

    def slowly(token: int) -> Any:
        steps.append(token)
        time.sleep(0.01)
        return step(token)

    monkeypatch.setattr(model._tape.decoder, "step", slowly)
    return steps


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def idle(url: str) -> bool:
    return httpx.get(f"{url}/health").json() == {"status": "ok", "running": False, "queued": 0}


def test_chat_says_what_the_model_says(client: openai.OpenAI, folder: Path) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HI, temperature=0, max_tokens=20)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert choice.message.content == api.generate(folder, "Hi", chat=True, max_new_tokens=20)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (20, 20, 40)
    assert (answer.object, answer.model) == ("chat.completion", NAME)


def test_a_stream_says_the_same_piece_by_piece(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": HI, "temperature": 1.0, "seed": 5, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == whole and len([text for text in texts if text]) > 20
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_whole_and_streamed(client: openai.OpenAI, folder: Path) -> None:
    answer = client.completions.create(model=NAME, prompt="Once", temperature=0)
    assert answer.choices[0].text == api.generate(folder, "Once", max_new_tokens=16)
    assert answer.choices[0].finish_reason == "length"
    with client.completions.create(model=NAME, prompt="Once", temperature=0, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    ids = list(b"Once")
    again = client.completions.create(model=NAME, prompt=[ids], temperature=0)  # other tokens than those of the text
    assert again.usage is not None and again.usage.prompt_tokens == 4


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=NAME, prompt="Once", temperature=0).choices[0].text
    stop = whole[5:7]
    answer = client.completions.create(model=NAME, prompt="Once", temperature=0, stop=stop).choices[0]
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_repeats(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": "Once", "temperature": 2.0, "top_p": 0.99}
    said = [client.completions.create(**asked, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_models(client: openai.OpenAI) -> None:
    assert [entry.id for entry in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "bitfloor"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n = 2 is not supported") as caught:
        client.chat.completions.create(model=NAME, messages=HI, n=2)
    assert caught.value.param == "n" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="this server has 'speaker'"):
        client.chat.completions.create(model="gpt-5", messages=HI)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="context holds 512") as caught:
            client.completions.create(model=NAME, prompt="x" * 600, stream=stream)
        assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="a user speaks first"):
        client.chat.completions.create(model=NAME, messages=[{"role": "assistant", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match="Token id 999") as caught:
        client.completions.create(model=NAME, prompt=[999])
    assert caught.value.param == "prompt"


def test_an_answer_may_fill_the_context(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="x" * (CONTEXT - 3), max_tokens=50, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b"{", "headers": JSON}, 400, "not JSON"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "send application/json"),
        ({"content": b"{}"}, 415, "missing"),
        ({"json": {"x": "y" * 30_000}}, 413, "larger than 20,000 bytes"),
        ({"json": {}, "headers": {"host": "evil.example:80"}}, 403, "not as 'evil.example:80'"),
        ({"content": rb'{"model": "\ud800"}', "headers": JSON}, 404, "does not exist"),
        ({"content": rb'{"\ud800": 1}', "headers": JSON}, 400, "is not supported"),
        (
            {"content": rb'{"model": "speaker", "messages": [{"role": "user", "content": "\ud800"}]}', "headers": JSON},
            400,
            "half",
        ),
    ],
)
def test_bodies_that_are_refused(url: str, request_: dict[str, Any], status: int, message: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", **request_)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_a_body_without_a_length_is_counted_as_it_comes(url: str) -> None:
    pieces = (b" " * 1000 for _ in range(50))
    answer = httpx.post(f"{url}/v1/completions", content=pieces, headers=JSON)
    assert answer.status_code == 413


def test_a_body_that_does_not_come(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 9"]
    head = "\r\n".join([*lines, "", ""]).encode()
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
        slow.sendall(head + b"{")
        assert b"408" in slow.recv(100)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as leaving:
        leaving.sendall(head + b"{")
    assert idle(url)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)])
def test_other_routes_are_error_objects_too(url: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{url}{path}")
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)


def test_sixty_four_clients_at_once_are_all_answered(url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        answer = await client.completions.create(model=NAME, prompt="Once", max_tokens=4, seed=seed, temperature=2.0)
        return answer.choices[0].text

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with (
            httpx.AsyncClient(limits=limits, timeout=60) as http,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):
            return await asyncio.gather(*(ask(client, seed) for seed in range(64)))

    texts = asyncio.run(all_of_them())
    assert len(texts) == 64 and all(texts) and len(set(texts)) > 8
    assert until(lambda: idle(url))


def test_a_client_that_hangs_up_in_mid_stream_stops_its_answer(url: str, slow: list[int]) -> None:
    asked = {"model": NAME, "prompt": "Once", "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
    assert until(lambda: idle(url), 2.0)  # the whole answer would take 4 s and more
    assert len(slow) < 200


def test_a_client_that_hangs_up_while_waiting_stops_its_answer(url: str, slow: list[int]) -> None:
    asked = {"model": NAME, "prompt": "Once", "max_tokens": 400}
    for _ in range(2):  # the first is answered when it leaves, the second waits
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=asked, timeout=0.3)
    assert until(lambda: idle(url), 2.0)
    assert len(slow) < 200


def test_a_full_queue_says_so(model: TextModel, slow: list[int]) -> None:
    with serving(model, Limits(waiting=1)) as url:
        asked = {"model": NAME, "prompt": "Once", "max_tokens": 60}
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json=asked, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert until(lambda: httpx.get(f"{url}/health").json()["running"])
        threads[1].start()
        assert until(lambda: httpx.get(f"{url}/health").json()["queued"] == 1)
        refused = httpx.post(f"{url}/v1/completions", json=asked)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]


def test_without_a_queue_one_is_answered_at_a_time(model: TextModel) -> None:
    with serving(model, Limits(waiting=0)) as url:
        asked = {"model": NAME, "prompt": "Once", "max_tokens": 2}
        for _ in range(2):
            assert httpx.post(f"{url}/v1/completions", json=asked, timeout=60).status_code == 200
            assert until(lambda: idle(url), 2.0)


def test_a_body_that_is_still_coming_does_not_hold_up_the_end(model: TextModel) -> None:
    with serving(model) as url:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        client = socket.create_connection((host, int(port)))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f'{head}Content-Length: 100\r\n\r\n{{"mod'.encode())
        assert until(lambda: idle(url))
    client.settimeout(10)
    answer = b"".join(iter(lambda: client.recv(4096), b"")).decode()
    client.close()
    assert " 503 " in answer.splitlines()[0] and '"shutting_down"' in answer


def test_a_failing_model_fails_one_request(url: str, model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(token: int) -> Any:
        raise RuntimeError("no more memory")

    asked = {"model": NAME, "prompt": "Once", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(model._tape.decoder, "step", fail)
        answer = httpx.post(f"{url}/v1/completions", json=asked)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "unexpected RuntimeError: no more memory."
        streamed = httpx.post(f"{url}/v1/completions", json={**asked, "stream": True})
        last = streamed.text.strip().split("\n\n")[-1]
        assert (
            streamed.status_code == 200 and json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        )
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.APIError, match="no more memory"),
            client.completions.create(model=NAME, prompt="Once", stream=True) as stream,
        ):
            list(stream)
    assert httpx.post(f"{url}/v1/completions", json=asked).status_code == 200


def test_an_api_key_is_asked_for(model: TextModel) -> None:
    with serving(model, api_key="s3cret") as url:
        for key in ("wrong", "s3cret\u00e9"):
            answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}".encode()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
            assert [entry.id for entry in client.models.list()] == [NAME]


def test_the_end_of_the_server_ends_running_and_waiting_answers(model: TextModel, slow: list[int]) -> None:
    answers: list[httpx.Response] = []
    asked = {"model": NAME, "prompt": "Once", "max_tokens": 400}
    with serving(model) as url:

        def ask(stream: bool) -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json={**asked, "stream": stream}, timeout=60))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False, False)]
        for thread in threads:
            thread.start()
        assert until(lambda: httpx.get(f"{url}/health").json()["queued"] == 2 and len(slow) > 3)
    for thread in threads:
        thread.join(10)
    assert len(slow) < 200
    assert sorted(answer.status_code for answer in answers) in ([200, 503, 503], [503, 503, 503])
    assert all("The server is shutting down." in answer.text for answer in answers)


def test_a_model_without_a_template_completes_only(tmp_path: Path) -> None:
    mute = api.text_model(save_speaker(tmp_path / NAME, template=None))
    with serving(mute) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model=NAME, messages=HI)
        assert client.completions.create(model=NAME, prompt="Once").choices[0].text


def test_a_port_in_use_and_hosts_that_are_not_ours() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(BitfloorError, match="is in use; choose another one with --port"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(InputError, match="is no address of this machine"):
            listen(host, 0)
    for host, local in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        address = listen(host, 0)
        address.socket.close()
        assert address.local == local


def test_an_empty_key_would_let_everybody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", " k ")
    assert key_from("SOME_KEY") == "k" and key_from(None) is None
    monkeypatch.setenv("SOME_KEY", "")
    with pytest.raises(InputError, match="SOME_KEY: that variable is empty"):
        key_from("SOME_KEY")


@pytest.mark.full  # starts the program twice; tests/cli/test_serve.py does the same in this process
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_program_from_start_to_ctrl_c(folder: Path, end: signal.Signals) -> None:
    command = [sys.executable, "-m", "bitfloor.cli", "serve", str(folder), "--port", "0", "--name", "other"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stderr is not None
        line = program.stderr.readline()
        assert line.startswith("other at http://127.0.0.1:") and line.endswith("/v1 (Ctrl-C ends)\n")
        with openai.OpenAI(base_url=line.split()[2], api_key="none", max_retries=3) as client:
            assert client.chat.completions.create(model="other", messages=HI, max_tokens=3).choices[0].message.content
        program.send_signal(end)
        rest = program.stderr.read()
        assert program.wait(20) == (0 if end is signal.SIGINT else -signal.SIGTERM)
        assert rest == ("stopped.\n" if end is signal.SIGINT else "")

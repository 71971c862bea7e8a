"""``bitfloor serve`` from its start to Ctrl-C, and what keeps it from starting."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli.conftest import Outcome, Run
from speaking import save_speaker

from bitfloor.cli import serve
from bitfloor.serving import server


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("serve") / "speaker")


Ask = Callable[[str], Any]


@pytest.fixture
def meanwhile(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Outcome, list[Any]]]:
    """Runs the command, asks something while it serves, and presses Ctrl-C."""

    def execute(ask: Ask, *arguments: object) -> tuple[Outcome, list[Any]]:
        answers: list[Any] = []
        begin = server.Server.serve_forever

        def served(self: server.Server) -> None:
            def press() -> None:
                try:
                    answers.append(ask(self._address.url))
                finally:
                    os.kill(os.getpid(), signal.SIGINT)

            thread = threading.Thread(target=press)
            thread.start()
            begin(self)
            thread.join()

        monkeypatch.setattr(server.Server, "serve_forever", served)
        return run("serve", *arguments, "--port", 0), answers

    return execute


def test_it_serves_until_ctrl_c(meanwhile, speaker: Path) -> None:
    def ask(url: str) -> Any:
        asked = {"model": "speaker", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        return httpx.post(f"{url}/v1/chat/completions", json=asked).json()

    outcome, [answer] = meanwhile(ask, speaker)
    assert len(answer["choices"][0]["message"]["content"]) == 3
    first, last = outcome.err.splitlines()
    assert first.startswith("speaker at http://127.0.0.1:") and last == "stopped."
    assert (outcome.code, outcome.out) == (0, "")


def test_names_keys_and_limits_are_passed_on(meanwhile, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k")

    def ask(url: str) -> list[int]:
        port = url.rpartition(":")[2]
        headers = {"authorization": "Bearer k", "host": "a.name.of.this.machine"}
        here = f"http://127.0.0.1:{port}/v1"
        found = httpx.get(f"{here}/models/other", headers=headers)
        large = httpx.post(f"{here}/completions", headers=headers, json={"prompt": "x" * 100})
        return [found.status_code, large.status_code, httpx.get(f"{here}/models").status_code]

    options = ("--host", "0.0.0.0", "--name", "other", "--api-key-env", "KEY", "--max-body", 50, "--context", 64)
    outcome, [answer] = meanwhile(ask, speaker, *options)
    assert answer == [200, 413, 401]
    assert "warning: 0.0.0.0 is not only this machine: whoever has the key can use the model" in outcome.err


def test_a_warning_without_a_key_and_a_note_without_a_template(meanwhile, tmp_path: Path) -> None:
    mute = save_speaker(tmp_path / "mute", template=None)
    outcome, _ = meanwhile(
        lambda url: httpx.get(f"http://127.0.0.1:{url.rpartition(':')[2]}/health"), mute, "--host", "0.0.0.0"
    )
    assert "everybody who reaches this port, without a key (--api-key-env), can use the model" in outcome.err
    assert "mute has no chat template: completions only." in outcome.err


def test_a_port_in_use(run: Run, speaker: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run("serve", speaker, "--port", port)
    expected = f"error: port {port} of 127.0.0.1 is in use; choose another one with --port.\n"
    assert (outcome.code, outcome.err) == (1, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", 70000), "--port"),
        (("--host", "192.0.2.1"), "is no address of this machine"),
        (("--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY: that variable is empty"),
        (("--port", 0, "--backend", "gpu"), "backend 'gpu' is unknown"),
    ],
)
def test_what_keeps_it_from_starting(run: Run, speaker: Path, options: tuple[object, ...], message: str) -> None:
    outcome = run("serve", speaker, *options)
    assert outcome.code == 2 and message in outcome.err


def test_packages_that_are_missing_are_named(run: Run, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    outcome = run("serve", speaker)
    assert (outcome.code, outcome.err) == (
        2,
        "error: serving needs starlette and uvicorn; pip install starlette uvicorn.\n",
    )

"""``bitfloor chat`` through a pipe, with Ctrl-C, and on a terminal."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
from cli.conftest import Outcome, Run
from speaking import save_speaker

from bitfloor.cli import chat


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("speaker"), context=160)


class Terminal(io.TextIOWrapper):
    """Says that somebody types into it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(run: Run, speaker: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def say(
        *lines: str, options: tuple[object, ...] = ("--temperature", 0), folder: Path = speaker, terminal: bool = False
    ) -> Outcome:
        data = "".join(f"{line}\n" for line in lines).encode("latin-1")
        with (Terminal if terminal else io.TextIOWrapper)(io.BytesIO(data), encoding="utf-8") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            return run("chat", folder, "--max-new-tokens", 12, *options)

    return say


def test_answers_go_to_stdout_and_how_fast_to_stderr(talk) -> None:
    outcome = talk("Hi", "", "Hi again")
    assert outcome.code == 0, outcome.err
    answers = outcome.out.splitlines()
    assert [len(answer) for answer in answers] == [12, 12] and answers[0] != answers[1]
    first, second = outcome.err.splitlines()
    assert first.startswith("[12 tokens, ") and "tokens/s; prompt of 20, first token after" in first
    assert first.endswith("; cut at --max-new-tokens]")
    assert "prompt of 59," in second  # 9 + 24 for the turn before, 15 + 11 for this one


def test_bytes_that_are_no_text_are_answered_all_the_same(talk) -> None:
    outcome = talk("Hi \xe9", "Hi")  # Latin-1 where UTF-8 is read
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 2


def test_reset_forgets_and_quit_leaves(talk) -> None:
    outcome = talk("Hi", "/reset", "Hi", "/quit", "Hi")
    first, second = outcome.out.splitlines()
    assert first == second and "forgotten." in outcome.err


def test_a_seed_repeats_an_answer_but_not_within_a_conversation(talk) -> None:
    seeded = ("--seed", 7, "--temperature", 3, "--top-p", 0.99)
    one, other = talk("Hi", "/reset", "Hi", options=seeded), talk("Hi", options=seeded)
    first, second = one.out.splitlines()
    assert first == other.out.splitlines()[0] != second


def test_the_system_message_is_told_first(talk) -> None:
    plain, told = talk("Hi"), talk("Hi", options=("--temperature", 0, "--system", "Be kind."))
    assert "prompt of 20," in plain.err and "prompt of 37," in told.err


def test_the_oldest_turns_are_forgotten_with_a_note(talk) -> None:
    outcome = talk(*["Hello, hello"] * 5)
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 5
    assert "[the context is full: the oldest turn is forgotten]" in outcome.err


def test_a_message_that_is_too_long_is_told_and_the_next_one_answered(talk) -> None:
    outcome = talk("x" * 200, "Hi")
    assert outcome.code == 2 and len(outcome.out.splitlines()) == 1
    assert "error: The prompt has 218 tokens and the model's context holds 160" in outcome.err
    assert talk("x" * 200, "Hi", terminal=True).code == 0  # somebody was there to read it


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed: list[int] = []

    def press(text: str) -> str:
        if text and not pressed:
            pressed.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return text

    monkeypatch.setattr(chat, "_shown", press)
    before = signal.getsignal(signal.SIGINT)
    outcome = talk("Hi", "Hi")
    assert outcome.code == 0
    first, second = outcome.out.splitlines()
    assert len(first) == 1 and len(second) == 12
    assert outcome.err.splitlines()[0].endswith("; stopped]")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_leaves(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(text: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return text

    monkeypatch.setattr(chat, "_shown", press)
    outcome = talk("Hi", "Hi")
    assert outcome.code == 130 and outcome.err == "error: interrupted.\n"


@pytest.mark.parametrize(("raised", "code"), [(EOFError, 0), (KeyboardInterrupt, 130)])
def test_ctrl_d_and_ctrl_c_at_the_prompt_leave(talk, monkeypatch: pytest.MonkeyPatch, raised, code: int) -> None:
    def end(prompt: str) -> str:
        raise raised

    monkeypatch.setattr("builtins.input", end)
    outcome = talk("Hi", terminal=True)
    assert outcome.code == code and "Ctrl-C stops an answer" in outcome.err


def test_a_model_without_a_template_is_refused(talk, tmp_path: Path) -> None:
    outcome = talk("Hi", folder=save_speaker(tmp_path / "mute", template=None))
    assert (outcome.code, outcome.out) == (2, "") and "no chat template" in outcome.err


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--temperature", -1), "temperature = -1"), (("--top-p", 0), "top_p = 0"), (("--seed", -1), "seed = -1")],
)
def test_numbers_out_of_range(talk, options, message: str) -> None:
    outcome = talk("Hi", options=options)
    assert outcome.code == 2 and message in outcome.err


def test_a_text_cannot_give_a_terminal_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\x07b\x9bc\td\r\n\u00e9\U0001f469\u200d\U0001f4bb"
    assert chat._shown(text) == text  # pytest's stdout is no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert chat._shown(text) == "a[2Jbc\td\n\u00e9\U0001f469\u200d\U0001f4bb"

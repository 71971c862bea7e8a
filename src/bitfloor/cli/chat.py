"""``bitfloor chat``: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from unicodedata import category

import typer

from bitfloor.cli.console import in_time, print_error, print_note
from bitfloor.cli.evaluate import Folder
from bitfloor.cli.generate import Activations, Backend
from bitfloor.cli.quantize import Device
from bitfloor.core.errors import InputError

if TYPE_CHECKING:
    from bitfloor.runtime.conversation import Conversation
    from bitfloor.runtime.sampling import Settings

RESET, QUIT = "/reset", "/quit"
HINT = f"Ctrl-C stops an answer, {RESET} forgets the conversation, {QUIT} or Ctrl-D leaves."
PROMPT = "> "

Context = Annotated[
    int | None,
    typer.Option("--context", metavar="N", min=2, help="Most tokens to hold.", show_default="8192, or the model's own"),
]
MOST_CONTEXT = 8192  # unless more is asked for: models are made for contexts whose cache no small machine can hold


def chat(
    folder: Folder,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="0 always takes the most likely token.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="Draw from the most likely tokens with this probability.")
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Makes answers repeatable.", show_default="another each time"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Of one answer.")] = 1024,
    context: Context = None,
    device: Device = "cpu",
    backend: Backend = "auto",
    activations: Activations = None,
) -> None:
    """Talk to a quantized model by its chat template."""
    from bitfloor import api
    from bitfloor.runtime.conversation import Conversation
    from bitfloor.runtime.sampling import Settings, fresh_seed

    seed = fresh_seed() if seed is None else seed
    Settings(max_new_tokens, temperature, top_p, seed)  # refuses values before anything is loaded
    model = api.text_model(
        folder, device=device, backend=backend, activations=activations, context=context or MOST_CONTEXT
    )
    conversation = Conversation(model, system)
    if sys.stdin.isatty():
        print_note(HINT)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text does not end the program
    asked = refused = 0
    while (line := _read()) is not None:
        if line.strip() == QUIT:
            break
        if line.strip() == RESET:
            conversation.reset()
            print_note("forgotten.")
        elif line.strip():
            # Another seed for every answer, or a question that is asked again would get the same draws.
            settings = Settings(max_new_tokens, temperature, top_p, (seed + asked) % (1 << 63))
            refused += not _answer(conversation, line, settings)
            asked += 1
    if refused and not sys.stdin.isatty():
        raise typer.Exit(2)  # nobody read the messages


def _read() -> str | None:
    """The next line that the user says; None at the end."""
    if sys.stdin.isatty():
        try:
            return input(PROMPT)
        except EOFError:
            sys.stdout.write("\n")
            return None
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _answer(conversation: Conversation, line: str, settings: Settings) -> bool:
    """Print one answer while it is made, and how fast that was; False if the line was refused, which is told."""
    try:
        forgotten = conversation.forget_for(line, settings)
    except InputError as error:
        print_error(str(error))
        return False
    if forgotten:
        turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
        print_note(f"[the context is full: the oldest {turns} forgotten]")
    began = time.perf_counter()
    times: list[float] = []
    ended = ""
    with _interruptible() as cancelled:
        for piece in conversation.ask(line, settings, cancelled):
            if piece.new_tokens > len(times):
                times.append(time.perf_counter())
            sys.stdout.write(_shown(piece.text))
            sys.stdout.flush()
            ended = piece.ended or ""
    sys.stdout.write("\n")
    sys.stdout.flush()
    print_note(_summary(conversation.prompt_tokens, [when - began for when in times], ended))
    return True


def _summary(prompt: int, times: list[float], ended: str) -> str:
    """``[12 tokens, 34.5 tokens/s; 80 of the prompt, first token after 0.3 s]``."""
    if not times:
        return "[stopped]"
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0 / times[0]
    why = {"cancelled": "stopped", "length": "cut at --max-new-tokens", "context": "the context is full"}.get(ended)
    told = f"[{len(times)} tokens, {rate:.1f} tokens/s; prompt of {prompt}, first token after {in_time(times[0])}"
    return f"{told}; {why}]" if why else f"{told}]"


def _shown(text: str) -> str:
    """On a terminal, without the control characters by which a text could give it orders."""
    if not sys.stdout.isatty():
        return text
    return "".join(letter for letter in text if letter in "\n\t" or category(letter) != "Cc")


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Inside, the first Ctrl-C makes the result return True, and only the second one interrupts."""
    asked: list[bool] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)

"""The progress of a run on stderr: a bar on a terminal, one line a block elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from bitfloor.cli.console import in_short, in_time, stderr

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitfloor.pipeline.events import Event

STEPS = ("block", "window")  # the kinds of event that count something up


@contextmanager
def watching(quiet: bool = False) -> Iterator[Callable[[Event], None]]:
    """A watcher for the events of a run, for as long as the ``with`` block lasts.

    Args:
        quiet: show notes only, no blocks and no bar.
    """
    console = stderr()
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(console, quiet)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress)


class _Lines:
    """One line for every event."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console = console
        self.quiet = quiet

    def __call__(self, event: Event) -> None:
        if self.quiet and event.kind != "note":
            return
        text = step_line(event) if event.kind in STEPS else event.message
        if text:
            self.console.print(Text(f"note: {text}" if event.kind == "note" else text), soft_wrap=True)


class _Bar:
    """A bar over the blocks; what is worth keeping is printed above it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("starting", total=None, facts="")

    def __call__(self, event: Event) -> None:
        if event.kind in STEPS:
            done, total = _done(event), event.blocks or None
            self.progress.update(self.task, completed=done, total=total, description=_label(event), facts=_facts(event))
        elif event.kind == "stage":
            self.progress.update(self.task, description=event.message)
        elif event.message:
            text = f"note: {event.message}" if event.kind == "note" else event.message
            self.progress.console.print(Text(text), soft_wrap=True)


def step_line(event: Event) -> str:
    """``block 3/30  loss 0.00123  12 s, 1 min 40 s left``."""
    return f"{_label(event)} {_done(event)}/{event.blocks}  {_facts(event)}"


def _label(event: Event) -> str:
    return f"{event.message}: {event.kind}" if event.message else event.kind


def _done(event: Event) -> int:
    return 0 if event.block is None else event.block + 1


def _facts(event: Event) -> str:
    loss = "" if event.loss is None else f"loss {in_short(event.loss)}  "
    left = "" if event.eta is None else f", {in_time(event.eta)} left"
    return f"{loss}{in_time(event.seconds)}{left}"

"""Where output goes and how numbers look. Results to stdout; progress, notes and errors to stderr.

``NO_COLOR`` and pipes are honoured: colour and bars appear only on a terminal. Text that is not ours (names, values,
error messages) is printed as it is, never as markup.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from bitfloor.core.errors import FormatWarning

PIPE_WIDTH = 160  # columns of a table that goes into a file or a pipe, where there is no terminal to ask


class PipeClosed(Exception):
    """Whoever read our output has gone away (``| head``)."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise PipeClosed


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout.isatty(), stderr=False)


def stderr() -> Console:
    """The console for progress, notes and errors."""
    return _console(sys.stderr.isatty(), stderr=True)


def _console(terminal: bool, *, stderr: bool) -> Console:
    width = None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    return _Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def display(*renderables: RenderableType) -> None:
    """Print results. Off the terminal, the spaces that only pad a table to its width are left out."""
    console = stdout()
    if console.is_terminal:
        console.print(*renderables, sep="\n")
        return
    with console.capture() as captured:
        console.print(*renderables, sep="\n")
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


@contextmanager
def own_warnings() -> Iterator[None]:
    """Inside, warnings of bitfloor's own are notes on stderr; others are shown as Python shows them."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, FormatWarning):
                print_note(f"note: {message}")
            else:
                shown(message, category, *place)

        warnings.showwarning = show
        yield


def print_json(data: Any) -> None:
    """Write one JSON document and nothing else to stdout. Numbers that are not finite become null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


def print_text(text: str) -> None:
    """Write text to stdout without wrapping or styling."""
    stdout().print(Text(text), soft_wrap=True)


def print_note(text: str) -> None:
    """Write one line for people to stderr."""
    stderr().print(Text(text), soft_wrap=True)


def print_error(sentence: str) -> None:
    """Write ``error: sentence`` to stderr."""
    stderr().print(Text("error: ", style="bold red"), Text(sentence), sep="", soft_wrap=True)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], *, left: int = 1) -> Table:
    """A plain table.

    Args:
        columns: headings.
        rows: cells as text.
        left: how many leading columns are aligned to the left; the others are numbers.
    """
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(columns):
        made.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def pairs(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of labels and values without headings."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column()
    made.add_column(overflow="fold")
    for label, value in rows:
        made.add_row(Text(label), Text(value))
    return made


def in_bytes(count: float | None) -> str:
    """``134.5 MB``; decimal units, as disks and downloads are measured."""
    if count is None:
        return "unknown"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if count < 10 * size else f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def in_time(seconds: float | None) -> str:
    """``42 s``, ``3 min 05 s`` or ``2 h 10 min``; a dash while unknown."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def in_short(value: float | None, digits: int = 3) -> str:
    """A number with a few significant digits; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"

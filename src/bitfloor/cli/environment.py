"""``bitfloor env``: what is installed, and which kernels are active and why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from bitfloor.cli.console import display, pairs, print_json


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, kernels and optional extras."""
    from bitfloor import api

    found = api.environment()
    if as_json:
        print_json(found)
        return
    display(pairs(lines(found)))


def lines(data: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Nested data as indented labels and values."""
    for key, value in data.items():
        label = "  " * depth + str(key).replace("_", " ")
        if isinstance(value, dict):
            yield label, ""
            yield from lines(value, depth + 1)
        elif isinstance(value, list | tuple):
            yield label, " ".join(map(str, value)) or "-"
        else:
            yield label, {True: "yes", False: "no", None: "-"}.get(value, str(value)) if _is_flag(value) else str(value)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)

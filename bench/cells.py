"""What the tables of results share: names, cells of a row, Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMES = {"wiki": "WikiText-2", "c4": "C4"}

Results = dict[str, dict[str, Any]]


def perplexity_cell(value: float) -> str:
    """Four significant digits or so; numbers of a broken model need fewer."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def difference_cell(found: Mapping[str, Any] | None) -> str:
    """``+0.123 [+0.110, +0.136]`` nats a token, or a dash."""
    if found is None:
        return "-"
    text = f"{found['delta_nll']:+.3f}"
    if found["ci95"] is None:
        return text
    low, high = found["ci95"]
    return f"{text} [{low:+.3f}, {high:+.3f}]"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def needed(results: Results, name: str) -> dict[str, Any]:
    """A result without which there is no table.

    Raises:
        SystemExit: it is missing.
    """
    if name not in results:
        raise SystemExit(f"bench/results/{name}.json is missing; docs/measuring.md says how it is made")
    return results[name]

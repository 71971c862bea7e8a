"""Draw stored bits against perplexity, one line a method, from the results of the yardstick, as an SVG file.

    python bench/figure.py           write docs/figures/bits-perplexity.svg
    python bench/figure.py --check   exit 1 if the file is not what the results give

Only text and lines, no library. Colours are middle tones, readable on white and on black; text follows the reader's
colour scheme where the viewer tells it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import record
import tables

OUT = record.ROOT / "docs" / "figures" / "bits-perplexity.svg"
# Dark enough for white, light enough for black (contrast of 3 or more to both).
COLOURS = ("#d9480f", "#1c7ed6", "#2b8a3e", "#9c36b5", "#b08800", "#0b8a9b", "#c2255c", "#495057")
PEER = ", its best setting"  # ends the name of a line of other software
SAME_TEXT = "+calibration.batch_size-4"  # a change to a preset that is not another method
WIDTH, HEIGHT = 400, 330
LEGEND_ROW = 20
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 44
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #777 }
.small { font-size: 11px }
.grid { stroke: #888; stroke-opacity: .3 }
.frame { fill: none; stroke: #888 }
@media (prefers-color-scheme: light) { text { fill: #444 } }
@media (prefers-color-scheme: dark) { text { fill: #bbb } }
"""


@dataclass(frozen=True)
class Series:
    """One method: ``(bits, perplexity)`` from few bits to many."""

    name: str
    points: tuple[tuple[float, float], ...]


def method_of(name: str) -> str:
    """``gptq`` for ``gptq-w2g64``: the preset without its width and group."""
    return name.rsplit("-", 1)[0]


def series(results: Mapping[str, Mapping[str, Any]], text: str) -> tuple[list[Series], float | None]:
    """Lines to draw for one text, and the float model's perplexity.

    Only plain presets with groups of 64 and the embedding at 16 bits: what the peers can be compared with.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    exact = None
    stored: dict[str, float] = {}
    for key, content in results.items():
        if not key.startswith("yardstick/"):
            continue
        value = content["perplexity"][text]["ppl"]
        if content["name"] == "float":
            exact = value
            continue
        name = content["name"].removesuffix(SAME_TEXT)
        if content["embedding_bits"] == tables.FLOAT_EMBEDDING and name.endswith("g64"):
            lines.setdefault(method_of(name), []).append((content["bits_per_linear_weight"], value))
            stored[content["name"]] = content["bits_per_linear_weight"]
    best: dict[str, dict[float, float]] = {}
    for row in results.get("comparison", {}).get("peers", ()):
        if row["strongest"] and row["text"] == text and row["ours"] in stored:
            # Where a peer's bits were not counted, its file would hold what ours holds at that width.
            bits = row["peer_bits"] or stored[row["ours"]]
            drawn = best.setdefault(row["peer_tool"].split()[0] + PEER, {})
            drawn[bits] = min(drawn.get(bits, row["peer_ppl"]), row["peer_ppl"])
    found = [*sorted(lines.items()), *((name, list(best[name].items())) for name in sorted(best))]
    return [Series(name, tuple(sorted(points))) for name, points in found], exact


# -- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """From bits and perplexity to coordinates: ``x`` linear, ``y`` logarithmic."""

    bits: tuple[float, float]
    perplexity: tuple[float, float]

    def x(self, bits: float) -> float:
        low, high = self.bits
        return LEFT + (bits - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = (math.log(end) for end in self.perplexity)
        return HEIGHT - BOTTOM - (math.log(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def axes_of(lines: Iterable[Series], exact: float | None) -> Axes:
    """Limits that hold every point, with a margin."""
    points = [point for line in lines for point in line.points]
    values = [value for _, value in points] + ([exact] if exact else [])
    bits = [bits for bits, _ in points]
    low, high = min(values), max(values)
    margin = max(high / low, 1.5) ** 0.06
    return Axes((math.floor(min(bits)), math.ceil(max(bits))), (low / margin, high * margin))


def ticks(low: float, high: float) -> list[float]:
    """Round values for a logarithmic axis; fewer when it is long."""
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
    every = [step * 10**power for power in range(-1, 13) for step in steps]
    return [value for value in every if low <= value <= high]


def panel(title: str, lines: Sequence[Series], exact: float | None, colours: Mapping[str, str]) -> list[str]:
    """One text's diagram."""
    axes = axes_of(lines, exact)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [f'<text x="{LEFT}" y="{TOP - 12}">{escape(title)}</text>']
    for value in ticks(*axes.perplexity):
        y = axes.y(value)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="small" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,g}</text>')
    for bits in range(int(axes.bits[0]), int(axes.bits[1]) + 1):
        x = axes.x(bits)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        out.append(f'<text class="small" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{bits}</text>')
    out.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>')
    middle = (LEFT + right) / 2
    label = "stored bits per linear weight"
    out.append(f'<text class="small" x="{middle:.0f}" y="{bottom + 34}" text-anchor="middle">{label}</text>')
    if exact is not None:
        y = axes.y(exact)
        out.append(f'<line stroke="#888" stroke-dasharray="5 4" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="small" x="{right - 4}" y="{y - 5:.1f}" text-anchor="end">float {exact:.2f}</text>')
    for line in lines:
        out += drawn(line, axes, colours[line.name])
    return out


def drawn(line: Series, axes: Axes, colour: str) -> list[str]:
    """A line with its points; each point says its numbers when it is pointed at. The peer's points are hollow."""
    places = [(axes.x(bits), axes.y(value)) for bits, value in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    peer = line.name.endswith(PEER)
    dashes = ' stroke-dasharray="2 3"' if peer else ""
    fill = "none" if peer else colour
    out = [f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dashes} points="{path}"/>']
    for (x, y), (bits, value) in zip(places, line.points, strict=True):
        said = escape(f"{line.name}: {bits:.2f} bits, perplexity {value:.2f}")
        radius = 5.5 if peer else 3.5
        out.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{colour}" stroke-width="1.6">'
        )
        out.append(f"<title>{said}</title></circle>")
    return out


def legend_rows(names: Sequence[str]) -> list[list[tuple[int, str]]]:
    """Names with their place, in as many rows as the width of both panels needs."""
    rows: list[list[tuple[int, str]]] = [[]]
    x = LEFT
    for name in names:
        width = 30 + 7 * len(name)
        if rows[-1] and x + width > 2 * WIDTH:
            rows.append([])
            x = LEFT
        rows[-1].append((x, name))
        x += width
    return rows


def legend(rows: Sequence[Sequence[tuple[int, str]]], colours: Mapping[str, str]) -> list[str]:
    """Names of the lines below the panels."""
    out = []
    for row, entries in enumerate(rows):
        y = HEIGHT + 12 + LEGEND_ROW * row
        for x, name in entries:
            fill = "none" if name.endswith(PEER) else colours[name]
            out.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{fill}" stroke="{colours[name]}" stroke-width="1.6"/>')
            out.append(f'<text x="{x + 10}" y="{y + 4}">{escape(name)}</text>')
    return out


def extent(results: Mapping[str, Mapping[str, Any]], text: str) -> str:
    """How much was scored, as the end of a title; empty when results of different amounts are mixed."""
    scored = [content["perplexity"][text] for key, content in results.items() if key.startswith("yardstick/")]
    amounts = {(entry["windows"], entry["seqlen"]) for entry in scored}
    return "".join(f", {windows} windows of {seqlen:,} tokens" for windows, seqlen in amounts if len(amounts) == 1)


def draw(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole figure.

    Raises:
        SystemExit: there is nothing to draw.
    """
    panels = [(label + extent(results, text), *series(results, text)) for text, label in tables.NAMES.items()]
    names = list(dict.fromkeys(line.name for _, lines, _ in panels for line in lines))
    if not names:
        raise SystemExit("there are no results to draw; run bench/yardstick.py")
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    body = []
    for index, (title, lines, exact) in enumerate(panels):
        inner = "\n".join(panel(title, lines, exact, colours))
        body.append(f'<g transform="translate({index * WIDTH} 0)">\n{inner}\n</g>')
    rows = legend_rows(names)
    height = HEIGHT + 10 + LEGEND_ROW * len(rows)
    size = f'width="{2 * WIDTH}" height="{height}" viewBox="0 0 {2 * WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    title = "<title>Stored bits per linear weight against perplexity</title>"
    inside = "\n".join([title, f"<style>{STYLE}</style>", *body, *legend(rows, colours)])
    return f"{head}\n{inside}\n</svg>\n"


def main() -> None:
    """Draw or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the figure is out of date")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    made = draw(tables.load_results(args.results))
    if args.check:
        if not args.out.is_file() or args.out.read_text("utf-8") != made:
            raise SystemExit(f"{args.out.name} is not what the results give; run python bench/figure.py")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(made, "utf-8")
    sys.stderr.write(f"wrote {args.out.name}\n")


if __name__ == "__main__":
    main()

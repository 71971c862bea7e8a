"""``bitfloor inspect``: what is in a quantized folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bitfloor.cli.bits import channel_widths, draw, histogram, legend, linears, plan_in, widths_of
from bitfloor.cli.console import display, in_bytes, in_short, in_time, pairs, print_json, print_note, table
from bitfloor.cli.inspection import Inspection, Layer, inspect_folder
from bitfloor.core.errors import InputError


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of bitfloor quantize.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/cli.md has the schema).")] = False,
    bits: Annotated[bool, typer.Option("--bits", help="Show the widths of groups by kind of layer and depth.")] = False,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE.png", help="With --bits: draw the bit map too.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all files and compare their checksums.")] = False,
) -> None:
    """Show bits, bytes, errors and times, layer by layer."""
    if image is not None and not bits:
        raise InputError("--image draws the bit map of --bits; add --bits.")
    if bits and as_json:
        raise InputError("--bits is a table, and --json prints the layers with their segments; use one of them.")
    found = inspect_folder(folder, verify=verify)
    if bits:
        _show_bits(found, folder, image)
        return
    if as_json:
        print_json(found.as_json())
        return
    learnt = any(layer.learning for layer in found.layers)
    headings = ["layer", "shape", "bits", "group", "bytes", "bits/weight", "block error", "time"]
    if learnt:
        headings.insert(7, "loss, learning")
    display(table(headings, (_row(layer, learnt) for layer in found.layers)), summary(found))
    fallbacks = [(layer.name, layer.note) for layer in found.layers if layer.note]
    if fallbacks:
        display(pairs([("fallbacks", str(len(fallbacks))), *fallbacks]))


def _show_bits(found: Inspection, folder: Path, image: Path | None) -> None:
    plan = plan_in(folder)
    for by_depth in (False, True):
        headings, *rows = histogram(found, plan, by_depth=by_depth)
        display(table(headings, rows))
    if image is not None:
        channels = channel_widths(folder)
        draw(found, plan, image, channels)
        used = {width for layer in linears(found) for width in widths_of(layer, plan)}
        cell = "a line an input channel" if channels else "a cell a group"
        print_note(f"\nwrote {image}: a row a block, a strip a matrix, {cell}; {legend(used)}")


def summary(found: Inspection) -> Table:
    """The whole model in a few lines, as a renderable."""
    nbytes = found.nbytes
    linear = found.bits_per_linear_weight
    learnt = []
    if found.restoration is not None:
        before, after = in_short(found.restoration["before"]), in_short(found.restoration["after"])
        learnt.append(("restored", f"loss {before} to {after} between two quantizations"))
    if found.tuning is not None:
        before, after = in_short(found.tuning["before"]), in_short(found.tuning["after"])
        learnt.append(("tuned", f"divergence {before} to {after}; errors of blocks are from before"))
    return pairs(
        [
            ("recipe", str(found.recipe.get("name", "unknown"))),
            ("format version", str(found.format_version)),
            *checked(found.verified),
            ("bits per linear weight", "-" if linear is None else f"{linear:.3f}"),
            ("bits per parameter", f"{found.bits_per_parameter:.3f}"),
            ("size", f"{in_bytes(nbytes['total'])}, {found.ratio:.2f}x smaller than at 16 bits"),
            ("  linears", in_bytes(nbytes["linears"])),
            ("  embeddings", in_bytes(nbytes["embeddings"])),
            ("  other", in_bytes(nbytes["other"])),
            *learnt,
        ],
    )


def checked(verified: Mapping[str, list[str]] | None) -> list[tuple[str, str]]:
    """What --verify found, in words."""
    if verified is None:
        return []
    without = verified["without_checksum"]
    said = f"{len(verified['files'])} as written"
    return [("files", f"{said}, {len(without)} without a checksum ({', '.join(without)})" if without else said)]


def _row(layer: Layer, learnt: bool) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.shape[0]} x {layer.shape[1]}",
        _joined(layer, "bits"),
        _joined(layer, "group_size")
        + (", sorted" if layer.sorted else "")
        + (f", rotated {layer.rotation}" if layer.rotation else ""),
        in_bytes(layer.nbytes),
        f"{layer.bits_per_weight:.3f}",
        in_short(layer.block_error),
        *([_learning(layer)] if learnt else []),
        in_time(layer.seconds),
    )


def _learning(layer: Layer) -> str:
    """The loss of the layer's block before and after learning."""
    if layer.learning is None:
        return "-"
    return f"{in_short(layer.learning['before'])} to {in_short(layer.learning['after'])}"


def _joined(layer: Layer, key: str) -> str:
    """``2``, or ``4+1`` for two segments; equal values are said once."""
    values = [str(segment[key]) for segment in layer.segments]
    return values[0] if len(set(values)) == 1 else "+".join(values)

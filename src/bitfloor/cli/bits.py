"""``bitfloor inspect --bits``: which groups have which width, by kind of layer and by depth, and as a picture."""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bitfloor.cli.inspection import Inspection, Layer
from bitfloor.cli.report import REPORT, read_report
from bitfloor.core.bit_plan import BitPlan, read_plan
from bitfloor.core.errors import InputError
from bitfloor.formats.atomic import atomic_file
from bitfloor.formats.checkpoint import read_checkpoint

PLAN = "plan.json"
# From one bit to eight: a scale from light to dark that also reads in grey.
COLOURS = {
    1: (253, 231, 37),
    2: (122, 209, 81),
    3: (34, 168, 132),
    4: (42, 120, 142),
    5: (65, 68, 135),
    6: (68, 1, 84),
    8: (20, 0, 30),
}
BACKGROUND = (255, 255, 255)
CELL, GAP = 6, 4


def widths_of(layer: Layer, plan: BitPlan | None) -> tuple[int, ...]:
    """Width of every group of a matrix, in natural order where the folder has a plan, else as they are stored.

    Groups of unequal sizes (whole channels of two widths) are cut into pieces of one size, so that each counts by its
    columns.
    """
    if plan is not None and layer.name in plan.matrices:
        return plan.matrices[layer.name].widths
    found: list[int] = []
    size = math.gcd(*(segment["group_size"] for segment in layer.segments))
    for segment in layer.segments:
        found += [segment["bits"]] * -(-segment["columns"] // size)
    return tuple(found)


def channel_widths(folder: Path) -> dict[str, tuple[int, ...]]:
    """Width of every input channel, by matrix, where whole channels have a width of their own and so an order.

    Of a matrix that uses the order of another, which has the same widths, there are none.

    Raises:
        InputError: a damaged folder.
    """
    checkpoint = read_checkpoint(folder)
    found: dict[str, tuple[int, ...]] = {}
    for name, index in checkpoint.native.matrices.items():
        layout = checkpoint.native.layouts[index]
        order, columns = layout["order"], layout["shape"][1]
        if order is None or order["unit"] != 1 or order["count"] != columns or len(layout["segments"]) < 2:
            continue
        if name in checkpoint.native.orders:
            found[name] = ()
            continue
        path, entry = checkpoint.tensors[f"{name}.order"]
        with path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.nbytes)
        size = entry.nbytes // columns
        channels = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
        if sorted(channels) != list(range(columns)):
            raise InputError(f"{name}.order is no order of its {columns} input channels; copy the folder again.")
        stored = [part["bits"] for part in layout["segments"] for _ in range(part["columns"])]
        widths = dict(zip(channels, stored, strict=True))
        found[name] = tuple(widths[channel] for channel in range(columns))
    return found


def plan_in(folder: Path) -> BitPlan | None:
    """The plan that a quantized folder was made by, if it lies there as it was."""
    if not (folder / PLAN).is_file() or not (folder / REPORT).is_file():
        return None
    plan = read_plan(folder / PLAN)
    made_by = (read_report(folder).get("allocation") or {}).get("sha256")
    return plan if plan.sha256() == made_by else None


def place(name: str) -> tuple[int, str]:
    """Depth and kind of a matrix: ``model.layers.3.mlp.up_proj`` is ``(3, "up_proj")``."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return int(numbers[0]) if numbers else -1, name.rpartition(".")[2]


def histogram(found: Inspection, plan: BitPlan | None, *, by_depth: bool) -> list[tuple[str, ...]]:
    """Rows of a table: a kind of layer or a block, its mean width, and the share of its groups at every width.

    Args:
        found: the folder.
        plan: of the folder.
        by_depth: rows are blocks; otherwise kinds of layers.
    """
    counts: dict[str, Counter[int]] = {}
    for layer in linears(found):
        depth, kind = place(layer.name)
        counts.setdefault(f"block {depth}" if by_depth else kind, Counter()).update(widths_of(layer, plan))
    known = sorted({width for count in counts.values() for width in count})
    rows = [("", "mean", *(f"{width} bit" for width in known))]
    for name, count in counts.items():
        total = sum(count.values())
        mean = sum(width * number for width, number in count.items()) / total
        shares = (f"{100 * count[width] / total:.1f}%" if count[width] else "-" for width in known)
        rows.append((name, f"{mean:.3f}", *shares))
    return rows


def linears(found: Inspection) -> list[Layer]:
    """The quantized matrices of the blocks.

    Raises:
        InputError: there are none.
    """
    layers = [layer for layer in found.layers if layer.kind not in ("embedding", "head")]
    if not layers:
        raise InputError("no matrix of a block is quantized here; there are no bits to show.")
    return layers


def draw(found: Inspection, plan: BitPlan | None, path: Path, channels: Mapping[str, tuple[int, ...]]) -> None:
    """Write the bit map as a PNG: a row for each block, a strip for each of its matrices, a cell for each group.

    Args:
        found: the folder.
        plan: of the folder.
        path: the file.
        channels: of matrices whose channels have a width each (:func:`channel_widths`); these get a line a channel, and
            those with the order of another no strip of their own.

    Raises:
        InputError: the file cannot be written, or is not a PNG by name.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} does not end in .png; the picture is a PNG.")
    blocks: dict[int, dict[str, Sequence[int]]] = {}
    for layer in linears(found):
        depth, _ = place(layer.name)
        # Experts have their number in the name and get a strip each.
        own = re.sub(r"^.*?\.\d+\.", "", layer.name)
        lines = channels.get(layer.name)
        if lines == ():
            continue
        cells = [width for width in widths_of(layer, plan) for _ in range(CELL)] if lines is None else lines
        blocks.setdefault(depth, {})[own] = cells
    kinds: dict[str, int] = {}
    for strips in blocks.values():
        for kind, lines in strips.items():
            kinds[kind] = max(kinds.get(kind, 0), len(lines))
    rows = [_row(blocks[depth], kinds) for depth in sorted(blocks)]
    with atomic_file(path) as file:
        file.write(png([row for row in rows for _ in range(CELL)]))


def _row(strips: Mapping[str, Sequence[int]], kinds: Mapping[str, int]) -> bytes:
    """One line of pixels of a block; ``kinds`` says how many pixels each of its strips has."""
    line = bytearray()
    for kind, most in kinds.items():
        widths = strips.get(kind, ())
        for at in range(most):
            line += bytes(COLOURS[widths[at]] if at < len(widths) else BACKGROUND)
        line += bytes(BACKGROUND) * GAP
    return bytes(line)


def png(rows: Sequence[bytes]) -> bytes:
    """An image file of lines of red, green and blue bytes (PNG, ISO/IEC 15948)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def legend(used: Iterable[int]) -> str:
    """What the colours mean."""
    return ", ".join(f"{width} bit #{''.join(f'{part:02x}' for part in COLOURS[width])}" for width in sorted(set(used)))

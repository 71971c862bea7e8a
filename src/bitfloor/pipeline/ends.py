"""Everything outside the blocks: embedding and head are quantized row by row, the rest is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode, pack
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.formats import native
from bitfloor.formats.layout import part_shapes
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.job import Assignment
from bitfloor.pipeline.journal import Entry
from bitfloor.solvers.ranges import search_grid

ROWS = 8192  # rows of an embedding treated at once; the whole table in float32 may be larger than a block


# Rows of a table ``[R, D]`` float32 and its storage to codes, grid, and a note.
Rounding = Callable[[Tensor, QuantSpec], tuple[Tensor, Grid, str | None]]


def to_nearest(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Grid, str | None]:
    """On searched grids, every channel alike."""
    grid = search_grid(rows, torch.ones(rows.shape[1], device=rows.device), spec)
    return encode(rows, grid), grid, None


def make_ends(source: SourceModel, assignment: Assignment, device: str, head: Rounding | None = None) -> Entry:
    """Quantize embedding and head as the assignment says, and collect every other tensor outside the blocks.

    Rows are independent, so the table is treated in panels; errors are relative to the weights, every channel alike.

    Args:
        source: the float model.
        assignment: the storage of every matrix.
        device: where tables are quantized.
        head: how the rows of the head are rounded, the embedding's if they are one; None for nearest.
    """
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    for name, spec in assignment.of_block(-1).items():
        began = time.perf_counter()
        ref = assignment.refs[name]
        weight = source.read(ref.param)
        rounding = head if head is not None and is_head(ref, assignment) else to_nearest
        error, parts, layout, note = _quantize_table(weight, spec, ref.kind, device, rounding)
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        layouts[name] = layout
        reports[name] = {"output_error": error, "seconds": time.perf_counter() - began, "note": note}
    prefix = f"{source.map.blocks_path}."
    for name in (*source.map.kept, *_kept_params(assignment, -1)):
        if not name.startswith(prefix):
            tensors[name] = source.read(name)
    return Entry(tensors, {"layouts": layouts, "reports": reports, "block_error": None})


def is_head(ref: MatrixRef, assignment: Assignment) -> bool:
    """Whether a matrix outside the blocks makes the logits."""
    return ref.kind == ("embedding" if assignment.tied else "head")


def _kept_params(assignment: Assignment, block: int) -> list[str]:
    refs = (assignment.refs[name] for name in assignment.kept)
    return list(dict.fromkeys(ref.param for ref in refs if ref.block == block))


def _quantize_table(
    weight: Tensor, spec: QuantSpec, kind: str, device: str, rounding: Rounding
) -> tuple[float, dict[str, Tensor], dict[str, Any], str | None]:
    """Relative error of a table ``[V, D]`` made panel by panel, its stored tensors by part, its layout, and a note."""
    stored: dict[str, list[Tensor]] = {}
    above = below = 0.0
    layout: dict[str, Any] = {}
    note = None
    for panel in torch.split(weight, ROWS):
        part = panel.to(device, torch.float32)
        codes, grid, note = rounding(part, spec)
        packed = pack(codes, grid)
        above += float((decode(codes, grid) - part).square().sum(dtype=torch.float64))
        below += float(part.square().sum(dtype=torch.float64))
        layout = native.layout(packed, kind=kind)
        for key, tensor in native.encode("", packed).items():
            stored.setdefault(key.removeprefix("."), []).append(tensor.cpu())
    layout["shape"] = list(weight.shape)
    # Row blocks come first in every stored part, and panels are whole row blocks, so panels concatenate.
    return above / below if below else 0.0, {key: torch.cat(parts) for key, parts in stored.items()}, layout, note


def decode_table(entry: Entry, name: str, into: Tensor) -> None:
    """Write the table ``[V, D]`` a packed embedding stands for into a tensor, panel by panel.

    Args:
        entry: the journal's part with the embedding.
        name: the embedding.
        into: ``[V, D]``, any float dtype and device; overwritten.
    """
    layout: dict[str, Any] = entry.facts["layouts"][name]
    parts = {part: entry.tensors[f"{name}.{part}"] for part in part_shapes(layout)}
    for start in range(0, into.shape[0], ROWS):
        rows = min(ROWS, into.shape[0] - start)
        blocks = slice(start // 16, (start + rows + 15) // 16)
        panel = native.assemble(layout, {part: tensor[blocks] for part, tensor in parts.items()}, rows)
        into[start : start + rows] = dequantize(panel).to(into)

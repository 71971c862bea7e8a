"""Packed matrix product and embedding lookup in plain torch: the definition every kernel is tested against.

Weights are computed in float32 and cast once to the dtype of the activations; the product then accumulates in float32
(what matrix products of half-precision types do). Only a panel of rows is ever dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfloor.core.basis import ordered
from bitfloor.core.packed import PackedWeight, Segment, dequantize
from bitfloor.core.rotation import rotate

# Weights of one panel. On a CPU the float32 panel should stay in its cache (1 MiB; 2.4 times faster than 16 MiB for a
# short input); elsewhere a launch costs more than a round through memory.
CPU_PANEL_WEIGHTS = 1 << 18
PANEL_WEIGHTS = 1 << 24
ROWS = 16


def panels(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` rows of each panel of a matrix ``[rows, columns]``; starts are multiples of 16."""
    weights = CPU_PANEL_WEIGHTS if device.type == "cpu" else PANEL_WEIGHTS
    step = max(ROWS, weights // columns // ROWS * ROWS)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def linear(
    x: Tensor,
    shape: tuple[int, int],
    panel: Callable[[int, int], PackedWeight],
    bias: Tensor | None = None,
    rotation: int = 0,
    channels: Tensor | None = None,
) -> Tensor:
    """``y = x W^T + bias`` with ``W`` dequantized panel by panel. Order and rotation are done to ``x``, once.

    Args:
        x: ``[..., I]`` floating point.
        shape: ``(O, I)`` of the packed matrix.
        panel: ``panel(start, stop)`` is the packed matrix of those rows; starts are multiples of 16.
        bias: ``[O]`` or None.
        rotation, channels: of the packed matrix.

    Returns:
        ``[..., O]`` in the dtype of ``x``.
    """
    parts = []
    x = rotate(ordered(x, channels), rotation)
    for start, stop in panels(*shape, x.device):
        part_bias = None if bias is None else bias[start:stop].to(x.dtype)
        parts.append(
            F.linear(x, dequantize(replace(panel(start, stop), rotation=0, channels=None), x.dtype), part_bias)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def row_panel(weight: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Rows ``start`` to ``stop`` of a packed matrix; ``start`` is a multiple of 16. Codes are not copied."""
    assert start % ROWS == 0
    blocks = slice(start // ROWS, -(-stop // ROWS))

    def cut(segment: Segment) -> Segment:
        return replace(
            segment,
            codes=segment.codes[blocks],
            scale=segment.scale[start:stop],
            zero=segment.zero[start:stop] if isinstance(segment.zero, Tensor) else segment.zero,
            offset=None if segment.offset is None else segment.offset[start:stop],
        )

    return replace(weight, shape=(stop - start, weight.shape[1]), segments=tuple(map(cut, weight.segments)))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + bias`` for a packed matrix: ``x [..., I]`` to ``[..., O]``, in the dtype of ``x``."""
    own = (weight.rotation, weight.channels)
    return linear(x, weight.shape, lambda start, stop: row_panel(weight, start, stop), bias, *own)


def take_rows(weight: PackedWeight, rows: Tensor) -> PackedWeight:
    """The packed matrix of selected rows, without unpacking the others.

    A row's codes are dword ``row % 16`` of every line of its row block, so rows move between tiles as whole dwords.

    Args:
        weight: ``[O, I]``.
        rows: int64 ``[n]``, each in ``[0, O)``.

    Returns:
        ``[n, I]``, packed.
    """
    count = rows.numel()
    blocks = -(-count // ROWS)

    def pick(segment: Segment) -> Segment:
        lines = segment.codes.reshape(segment.codes.shape[0], -1, ROWS, 4)
        own = lines[rows // ROWS, :, rows % ROWS]  # [n, lines, 4]
        padded = own.new_zeros(blocks * ROWS, *own.shape[1:])
        padded[:count] = own
        codes = padded.view(blocks, ROWS, -1, 4).transpose(1, 2).reshape(blocks, -1, 64 * segment.bits)
        return replace(
            segment,
            codes=codes,
            scale=segment.scale[rows],
            zero=segment.zero[rows] if isinstance(segment.zero, Tensor) else segment.zero,
            offset=None if segment.offset is None else segment.offset[rows],
        )

    return replace(weight, shape=(count, weight.shape[1]), segments=tuple(map(pick, weight.segments)))


def packed_embedding(weight: PackedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``ids [...]`` of a packed matrix ``[V, D]`` as dense vectors ``[..., D]`` of ``dtype``."""
    if ids.numel() == 0:
        return torch.empty(*ids.shape, weight.shape[1], dtype=dtype, device=ids.device)
    unique, inverse = torch.unique(ids, return_inverse=True)
    return dequantize(take_rows(weight, unique), dtype)[inverse]

"""Codes to bytes: the tile layout of the native format, in plain torch. This module *is* the definition.

A tile holds 16 rows x 32 columns of one width ``b`` in exactly ``64 * b`` bytes, that is ``b`` cache lines. A line is
16 dwords; dword ``r`` belongs to row ``r`` of the tile and byte ``j`` of it to the columns ``4 q + j``. So a line read
as it lies is the operand of a four-way int8 dot product, and one mask selects one *quad* ``q`` of columns.

A tile has eight quads. ``LINES[b]`` says where their bits lie: for each line the fields ``(quad, low, width, at)``,
meaning that ``width`` bits of the code of ``quad``, from bit ``low`` upwards, stand at bit ``at`` of every byte.
Nothing is wasted: the fields of the ``b`` lines fill all ``8 b`` bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16
COLUMNS = 32
QUADS = 8

Field = tuple[int, int, int, int]

LINES: dict[int, tuple[tuple[Field, ...], ...]] = {
    1: (tuple((q, 0, 1, q) for q in range(8)),),
    2: tuple(tuple((4 * line + p, 0, 2, 2 * p) for p in range(4)) for line in range(2)),
    3: (
        ((0, 0, 3, 0), (1, 0, 3, 3), (6, 0, 2, 6)),
        ((2, 0, 3, 0), (3, 0, 3, 3), (7, 0, 2, 6)),
        ((4, 0, 3, 0), (5, 0, 3, 3), (6, 2, 1, 6), (7, 2, 1, 7)),
    ),
    4: tuple(((2 * line, 0, 4, 0), (2 * line + 1, 0, 4, 4)) for line in range(4)),
    5: (
        ((0, 0, 5, 0), (5, 0, 3, 5)),
        ((1, 0, 5, 0), (6, 0, 3, 5)),
        ((2, 0, 5, 0), (7, 0, 3, 5)),
        ((3, 0, 5, 0), (5, 3, 2, 5), (7, 4, 1, 7)),
        ((4, 0, 5, 0), (7, 3, 1, 5), (6, 3, 2, 6)),
    ),
    6: (
        ((0, 0, 6, 0), (6, 0, 2, 6)),
        ((1, 0, 6, 0), (6, 2, 2, 6)),
        ((2, 0, 6, 0), (6, 4, 2, 6)),
        ((3, 0, 6, 0), (7, 0, 2, 6)),
        ((4, 0, 6, 0), (7, 2, 2, 6)),
        ((5, 0, 6, 0), (7, 4, 2, 6)),
    ),
    8: tuple(((q, 0, 8, 0),) for q in range(8)),
}


def row_blocks(rows: int) -> int:
    """Number of 16-row blocks that hold ``rows`` rows."""
    return -(-rows // ROWS)


def tiles(columns: int) -> int:
    """Number of 32-column tiles that hold ``columns`` columns."""
    return -(-columns // COLUMNS)


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into tiles.

    Args:
        codes: ``[O, K]`` uint8, every value below ``2 ** bits``.
        bits: width, a key of ``LINES``.

    Returns:
        ``[ceil(O / 16), ceil(K / 32), 64 * bits]`` uint8; padding rows and columns are zero.
    """
    rows, columns = codes.shape
    blocks, count = row_blocks(rows), tiles(columns)
    full = codes.new_zeros(blocks * ROWS, count * COLUMNS)
    full[:rows, :columns] = codes
    quads = full.view(blocks, ROWS, count, QUADS, 4).permute(0, 2, 3, 1, 4)  # [Ob, T, quad, row, byte]
    out = codes.new_zeros(blocks, count, bits, ROWS, 4)
    for line, fields in enumerate(LINES[bits]):
        for quad, low, width, at in fields:
            out[:, :, line] |= ((quads[:, :, quad] >> low) & ((1 << width) - 1)) << at
    return out.reshape(blocks, count, 64 * bits)


def unpack_tiles(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Undo :func:`pack_tiles`.

    Args:
        packed: ``[Ob, T, 64 * bits]`` uint8.
        bits: width.
        rows: true number of rows ``O``.
        columns: true number of columns ``K``.

    Returns:
        ``[O, K]`` uint8 codes, contiguous.
    """
    blocks, count = packed.shape[0], packed.shape[1]
    lines = packed.reshape(blocks, count, bits, 4 * ROWS).view(torch.int32)  # four codes at a time: one row of a quad
    quads = lines.new_zeros(blocks, ROWS, count, QUADS)
    for line, fields in enumerate(LINES[bits]):
        source = lines[:, :, line].transpose(1, 2)  # [Ob, row, T]
        for quad, low, width, at in fields:
            # The shift copies the sign bit in from above, where the mask has no bits: at + width is at most 8.
            field = source if width == 8 else (source >> at) & (0x01010101 * ((1 << width) - 1))
            quads[..., quad] |= field << low if low else field
    return quads.view(torch.uint8).reshape(blocks * ROWS, count * COLUMNS)[:rows, :columns].contiguous()


def pack_zeros(zero: Tensor, bits: int) -> Tensor:
    """Pack zero-points at ``bits`` bits each: 16 rows of one group make ``2 * bits`` bytes.

    The 16 values of a (row block, group) form one little-endian bit stream: value ``r`` stands at bits
    ``r * bits .. r * bits + bits - 1``.

    Args:
        zero: ``[O, G]`` uint8, every value below ``2 ** bits``.

    Returns:
        ``[ceil(O / 16), G * 2 * bits]`` uint8.
    """
    rows, groups = zero.shape
    full = zero.new_zeros(row_blocks(rows) * ROWS, groups)
    full[:rows] = zero
    values = full.view(-1, ROWS, groups).transpose(1, 2)  # [Ob, G, 16]
    positions = torch.arange(bits, device=zero.device, dtype=torch.uint8)
    stream = ((values.unsqueeze(-1) >> positions) & 1).reshape(-1, groups, 2 * bits, 8)
    weights = torch.tensor([1 << p for p in range(8)], device=zero.device, dtype=torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8).reshape(-1, groups * 2 * bits)


def unpack_zeros(packed: Tensor, bits: int, rows: int, groups: int) -> Tensor:
    """Undo :func:`pack_zeros`: ``[Ob, G * 2 * bits]`` uint8 to ``[O, G]`` uint8."""
    positions = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = (packed.reshape(-1, groups, 2 * bits, 1) >> positions) & 1
    weights = torch.tensor([1 << p for p in range(bits)], device=packed.device, dtype=torch.uint8)
    values = (stream.reshape(-1, groups, ROWS, bits) * weights).sum(-1, dtype=torch.uint8)
    return values.transpose(1, 2).reshape(-1, groups)[:rows].contiguous()


def blocked(values: Tensor) -> Tensor:
    """Per-group values ``[O, G]`` as they lie on disk: ``[ceil(O / 16), G, 16]``, padding rows zero."""
    rows, groups = values.shape
    full = values.new_zeros(row_blocks(rows) * ROWS, groups)
    full[:rows] = values
    return full.view(-1, ROWS, groups).transpose(1, 2).contiguous()


def unblocked(values: Tensor, rows: int) -> Tensor:
    """Undo :func:`blocked`: ``[Ob, G, 16]`` to ``[O, G]``."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:rows].contiguous()

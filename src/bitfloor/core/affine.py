"""Affine grids per (row, group), rounding onto them, and turning the result into stored form.

    code = clamp(round((w - offset) / scale), 0, 2^b - 1)     w_hat = code * scale + offset,     offset = -zero * scale

A :class:`Grid` holds numbers that were already rounded through their storage type, so what is computed with a grid is
what a reader of the file computes. Widths may differ from group to group (``bits`` is a tensor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.basis import Basis
from bitfloor.core.channels import unpack_order
from bitfloor.core.packed import PackedWeight, Segment, centre, expand_groups, pack_segment

# The smallest positive scale of each storage type: float16's smallest subnormal, and bfloat16's smallest normal number
# (a reader that flushes subnormals to zero then still sees it).
SMALLEST_SCALE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126}


@dataclass(frozen=True, eq=False)
class Grid:
    """The quantization grid of a matrix ``[O, I]`` in groups of ``group_size`` columns.

    Args:
        scale: ``[O, G]`` float32, exactly representable in ``scale_dtype``; not zero, may be negative.
        zero: ``[O, G]`` float32 holding integers in ``[0, 2^b - 1]``, or None where no group has one. All rows of a
            group may have ``(2^b - 1) / 2`` instead, which is not stored: its levels are centred.
        offset: ``[O, G]`` float32, representable in ``scale_dtype``; the additive constant of groups without a
            zero-point, or None. Where both are given, one-bit groups have offsets and all others zero-points.
        bits: ``[G]`` int64 widths.
        group_size: columns per group; the last group may be short.
        constant_zero: every zero-point of a group of width b is ``2^(b-1)`` and is not stored.
        scale_dtype: storage type of scales and offsets.
    """

    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    bits: Tensor
    group_size: int
    constant_zero: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def shift(self) -> Tensor:
        """The additive constant ``[O, G]`` float32 of every group."""
        if self.zero is None:
            assert self.offset is not None
            return self.offset
        by_zero = -self.zero * self.scale
        return by_zero if self.offset is None else torch.where(self.bits == 1, self.offset, by_zero)

    @property
    def max_code(self) -> Tensor:
        """``[G]`` float32: the largest code of each group."""
        return (torch.ones_like(self.bits) << self.bits).float() - 1

    def columns(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(scale [O, I], shift [O, I], max_code [I])`` spread over ``count`` columns."""
        spread = [expand_groups(part, self.group_size, count) for part in (self.scale, self.shift, self.max_code)]
        return spread[0], spread[1], spread[2]


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values rounded through their 16-bit storage type, kept finite and, for scales, away from zero."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype).float()


def stored_scale(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Like :func:`stored`, for scales: a magnitude that would vanish becomes the smallest one, sign kept."""
    sign = torch.where(values < 0, -1.0, 1.0)
    return stored(sign * values.abs().clamp_min(SMALLEST_SCALE[dtype]), dtype)


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """Round-to-nearest codes of ``weight`` ``[O, I]`` on ``grid``: uint8 ``[O, I]``."""
    scale, shift, top = grid.columns(weight.shape[1])
    return torch.sub(weight, shift).div_(scale).round_().clamp_min_(0.0).minimum(top).to(torch.uint8)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Weights of codes ``[O, I]`` on ``grid``: float32 ``[O, I]``."""
    scale, shift, _ = grid.columns(codes.shape[1])
    return codes.float() * scale + shift


def pack(codes: Tensor, grid: Grid, basis: Basis | None = None) -> PackedWeight:
    """Store codes and grid: a segment for each width that occurs, narrow ones first, groups in natural order inside.

    Where the groups' natural order is not already sorted by width, the stored order says where each went, one entry a
    group.

    Args:
        codes: ``[O, I]`` uint8.
        grid: of any widths.
        basis: of the columns, None for the input channels as they are.
    """
    rows, columns = codes.shape
    basis = basis or Basis()
    widths = grid.bits.cpu()
    order = torch.argsort(widths, stable=True)
    segments: list[Segment] = []
    for bits in sorted(set(widths.tolist())):
        groups = order[widths[order] == bits]
        # The last group may be short; it comes last in its segment.
        at = (groups.unsqueeze(1) * grid.group_size + torch.arange(grid.group_size)).flatten()
        start = segments[-1].stop if segments else 0
        own = codes[:, at[at < columns].to(codes.device)].contiguous()
        segments.append(_segment(own, grid, groups.to(codes.device), bits, start))
    natural = bool((order == torch.arange(len(order))).all())
    return PackedWeight(
        (rows, columns),
        tuple(segments),
        None if natural else order.to(codes.device),
        1 if natural else grid.group_size,
        basis.rotation,
        torch.tensor(unpack_order(basis.channels), dtype=torch.int64, device=codes.device) if basis.channels else None,
    )


def _segment(codes: Tensor, grid: Grid, groups: Tensor, bits: int, start: int) -> Segment:
    """The segment of some groups of one width."""
    by_zero = grid.zero is not None and (grid.offset is None or bits > 1)
    zero: Tensor | float | None = None
    if by_zero:
        assert grid.zero is not None
        first = float(grid.zero[0, groups[0]])
        if first == centre(bits):
            zero = first
        else:
            zero = int(first) if grid.constant_zero else grid.zero[:, groups].to(torch.uint8)
    return pack_segment(
        codes,
        grid.scale[:, groups].to(grid.scale_dtype),
        bits=bits,
        group_size=grid.group_size,
        zero=zero,
        offset=None if by_zero or grid.offset is None else grid.offset[:, groups].to(grid.scale_dtype),
        start=start,
    )


def join_groups(parts: Sequence[Grid], group_size: int) -> Grid:
    """One grid from grids of one group each, in order.

    Args:
        parts: grids of ``[O, 1]``, of one storage type.
        group_size: columns per group of the whole; the last group may be short.

    Raises:
        ValueError: a group wider than one bit has an offset, another group a zero-point.
    """
    mixed = len({part.zero is None for part in parts}) > 1
    if mixed and any(part.zero is None and int(part.bits[0]) > 1 for part in parts):
        raise ValueError("beside groups with zero-points, only one-bit groups have offsets")
    blank = torch.zeros_like(parts[0].scale)
    zeros = [blank if part.zero is None else part.zero for part in parts if mixed or part.zero is not None]
    offsets = [blank if part.offset is None else part.offset for part in parts if mixed or part.offset is not None]
    return Grid(
        torch.cat([part.scale for part in parts], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
        torch.cat(offsets, dim=1) if offsets else None,
        torch.cat([part.bits for part in parts]),
        group_size,
        constant_zero=all(part.constant_zero for part in parts if part.zero is not None) and bool(zeros),
        scale_dtype=parts[0].scale_dtype,
    )

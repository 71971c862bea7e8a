"""A matrix whose groups have different widths, as something to learn: one learnable for all groups of a width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.affine import Grid
from bitfloor.solvers.block_opt import Learnable


@dataclass(frozen=True, eq=False)
class Share:
    """The groups of one width.

    Args:
        bits: the width.
        groups: int64, their numbers, rising.
        columns: int64, their columns, rising.
    """

    bits: int
    groups: Tensor
    columns: Tensor


def shares(widths: Sequence[int], group_size: int, columns: int) -> list[Share]:
    """The groups of a matrix by width, narrow ones first.

    Args:
        widths: of every group, in natural order.
        group_size: columns of a group; the last may be short, and is the last of its share too.
        columns: ``I``.
    """
    found = []
    for bits in sorted(set(widths)):
        groups = torch.tensor([k for k, width in enumerate(widths) if width == bits])
        at = (groups.unsqueeze(1) * group_size + torch.arange(group_size)).flatten()
        found.append(Share(bits, groups, at[at < columns]))
    return found


class Columns:
    """Learnables of the shares of a matrix, as one.

    Args:
        parts: every share and what learns it; their snapshots are codes and grid.
        shape: ``(O, I)``.
        group_size: columns of a group.
    """

    def __init__(self, parts: Sequence[tuple[Share, Learnable]], shape: tuple[int, int], group_size: int) -> None:
        self.parts = list(parts)
        self.shape, self.size = shape, group_size

    def fake_quantized(self) -> Tensor:
        """The weight ``[O, I]`` float32 at the present parameters, outside of any graph."""
        made = [(share, learnt.fake_quantized()) for share, learnt in self.parts]
        out = made[0][1].new_empty(self.shape)
        for share, part in made:
            out[:, share.columns.to(out.device)] = part
        return out

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """Every share takes its step."""
        for share, learnt in self.parts:
            learnt.step(grad[:, share.columns.to(grad.device)].contiguous(), rate, range_rate)

    def snapshot(self) -> list[Any]:
        """Snapshots of the shares, in order; :meth:`joined` makes one of them."""
        return [learnt.snapshot() for _, learnt in self.parts]


def joined(found: Sequence[tuple[Tensor, Grid]], of: Sequence[Share], columns: int) -> tuple[Tensor, Grid]:
    """Codes ``[O, I]`` and grid of a matrix from those of its shares."""
    codes = found[0][0].new_empty(found[0][0].shape[0], columns)
    groups = sum(len(share.groups) for share in of)
    first = found[0][1]
    scale = first.scale.new_empty(len(codes), groups)
    bits = torch.empty(groups, dtype=torch.int64, device=first.bits.device)
    zero = None if all(grid.zero is None for _, grid in found) else torch.zeros_like(scale)
    offset = None if all(grid.offset is None for _, grid in found) else torch.zeros_like(scale)
    for (own, grid), share in zip(found, of, strict=True):
        at = share.groups.to(scale.device)
        codes[:, share.columns.to(codes.device)] = own
        scale[:, at], bits[at.to(bits.device)] = grid.scale, grid.bits
        if zero is not None and grid.zero is not None:
            zero[:, at] = grid.zero
        if offset is not None and grid.offset is not None:
            offset[:, at] = grid.offset
    constant = zero is not None and all(grid.constant_zero for _, grid in found if grid.zero is not None)
    return codes, Grid(scale, zero, offset, bits, first.group_size, constant, first.scale_dtype)

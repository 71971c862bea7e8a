"""Random packed matrices for the operators: every width, group, zero-point, order and rotation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from packing import random_segment
from torch import Tensor

from bitfloor.core.packed import PackedWeight
from bitfloor.formats.native import encode, layout
from bitfloor.ops.form import PARTS
from bitfloor.runtime.linear import form_of

Split = Sequence[tuple[int, int]]  # columns and width of every segment


def matrix(
    rows: int,
    split: Split,
    *,
    group_size: int = 64,
    zero: str | int = "packed",
    channel_scale: bool = False,
    order: int = 0,
    rotation: int = 0,
    channels: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PackedWeight:
    """Random codes and scales. ``order`` is the unit of a random order, 0 for none; group size 0 is the whole segment.

    With an order the first stored channel stands for the last as well, which is then left out.
    """
    generator = torch.Generator().manual_seed(seed)
    segments, start = [], 0
    for columns, bits in split:
        given = {"zero": zero, "channel_scale": channel_scale, "dtype": dtype}
        made = random_segment(generator, rows, columns, bits, start=start, group_size=group_size or columns, **given)
        segments.append(made)
        start += columns
    index = None
    if order:
        entries = -(-start // order)
        index = torch.randperm(entries, generator=generator)
        if start % order == 0 and entries > 1:
            index[index == entries - 1] = index[0].clone() if index[0] != entries - 1 else index[1].clone()
    shuffled = torch.randperm(start, generator=generator) if channels else None
    return PackedWeight((rows, start), tuple(segments), index, order or 1, rotation, shuffled)


def stored(weight: PackedWeight) -> tuple[list[Tensor], list[int]]:
    """Parts and form, as a module holds them."""
    parts = {name.rpartition(".")[2]: tensor for name, tensor in encode("m", weight).items()}
    return [parts[name] for name in PARTS if name in parts], form_of(layout(weight))

"""The one value type every method ends in: column segments of packed codes, with their scales.

    w_hat[i, j] = (code[i, j] * scale[i, k] + offset[i, k]) * channel_scale[j]      float32, in this order, one cast

``k`` is the group of stored column ``j``; the offset of a zero-point is ``-zero * scale``. With a zero-point below 256
that is whole or half and a 16-bit scale the first two operations are exact in float32, so every reader gets the same
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.basis import restored
from bitfloor.core.bitpack import pack_tiles, row_blocks, unpack_tiles
from bitfloor.core.rotation import rotate


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of consecutive stored columns of one width.

    Args:
        start: first stored column.
        stop: one past the last stored column; ``K = stop - start``.
        bits: code width.
        group_size: columns per scale, positive; ``G = ceil(K / group_size)``, the last group may be short.
        codes: ``[ceil(O / 16), ceil(K / 32), 64 * bits]`` uint8, see :mod:`bitfloor.core.bitpack`.
        scale: ``[O, G]`` float16 or bfloat16; may be negative.
        zero: ``[O, G]`` uint8 (stored at ``bits`` bits), one constant for the segment (whole, or :func:`centre`), or
            None.
        offset: ``[O, G]`` of the scale's dtype, or None. Exactly one of ``zero`` and ``offset`` is given.
        channel_scale: ``[K]`` of the scale's dtype, or None.
    """

    start: int
    stop: int
    bits: int
    group_size: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | float | None = None
    offset: Tensor | None = None
    channel_scale: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.stop - self.start

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group_size)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized matrix ``[O, I]``: segments in stored column order, and that order.

    Args:
        shape: ``(O, I)``.
        segments: contiguous, from stored column 0.
        order: int64 ``[n]``; entry ``p`` names the input channels ``order[p] * order_unit ...`` (``order_unit`` of
            them, cut at ``I``) that follow each other in storage. None means natural order. An order may leave a
            channel out (its weight is zero) or repeat one (the planes add up).
        order_unit: channels per entry of ``order``.
        rotation: block size of the rotation of the input channels that what is stored must be multiplied with
            (:mod:`bitfloor.core.rotation`), after the columns were put into natural order; 0 for none.
        channels: int64 ``[I]``, input channel of every column of that product (:mod:`bitfloor.core.basis`); None for
            natural order.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    order: Tensor | None = None
    order_unit: int = 1
    rotation: int = 0
    channels: Tensor | None = None


def pack_segment(
    codes: Tensor,
    scale: Tensor,
    *,
    bits: int,
    group_size: int,
    zero: Tensor | float | None = None,
    offset: Tensor | None = None,
    channel_scale: Tensor | None = None,
    start: int = 0,
) -> Segment:
    """Pack ``[O, K]`` uint8 codes and their 16-bit side values into a :class:`Segment` that begins at ``start``."""
    assert (zero is None) != (offset is None), "a segment has a zero-point or an offset"
    assert scale.shape == (codes.shape[0], -(-codes.shape[1] // group_size))
    packed_zero = zero.to(torch.uint8) if isinstance(zero, Tensor) else zero
    return Segment(
        start=start,
        stop=start + codes.shape[1],
        bits=bits,
        group_size=group_size,
        codes=pack_tiles(codes, bits),
        scale=scale,
        zero=packed_zero,
        offset=offset,
        channel_scale=channel_scale,
    )


def centre(bits: int) -> float:
    """The zero-point around which the levels of a width lie in pairs: ``(2^b - 1) / 2``."""
    return ((1 << bits) - 1) / 2


def expand_groups(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Per-group values ``[..., G]`` repeated over their columns: ``[..., K]``."""
    return values.repeat_interleave(group_size, dim=-1)[..., :columns]


def segment_codes(segment: Segment, rows: int) -> Tensor:
    """The codes of a segment as ``[O, K]`` uint8."""
    return unpack_tiles(segment.codes, segment.bits, rows, segment.columns)


def segment_offset(segment: Segment) -> Tensor:
    """The additive constant of every group, float32 ``[O, G]``: the stored offset, or ``-zero * scale``."""
    if segment.offset is not None:
        return segment.offset.float()
    assert segment.zero is not None
    zero = segment.zero.float() if isinstance(segment.zero, Tensor) else float(segment.zero)
    return -zero * segment.scale.float()


def dequantize_segment(segment: Segment, rows: int) -> Tensor:
    """The weights of a segment in stored column order, float32 ``[O, K]``."""
    codes = segment_codes(segment, rows).float()
    scale = expand_groups(segment.scale.float(), segment.group_size, segment.columns)
    weight = codes.mul_(scale).add_(expand_groups(segment_offset(segment), segment.group_size, segment.columns))
    return weight if segment.channel_scale is None else weight.mul_(segment.channel_scale.float())


def column_index(weight: PackedWeight) -> Tensor | None:
    """Input channel of every stored column, int64 ``[stored columns]``, or None for natural order."""
    if weight.order is None:
        return None
    unit = weight.order_unit
    index = (weight.order.long().unsqueeze(1) * unit + torch.arange(unit, device=weight.order.device)).reshape(-1)
    return index[index < weight.shape[1]]


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense matrix ``[O, I]`` that a packed weight stands for, computed in float32 and cast once.

    Args:
        weight: the packed matrix.
        dtype: dtype of the result.
    """
    rows, columns = weight.shape
    parts = [dequantize_segment(segment, rows) for segment in weight.segments]
    stored = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    index = column_index(weight)
    if index is not None:
        stored = stored.new_zeros(rows, columns).index_add_(1, index, stored)
    return restored(rotate(stored, weight.rotation), weight.channels).to(dtype)


def order_dtype(weight: PackedWeight) -> torch.dtype:
    """The smallest unsigned type that holds every entry of the stored order."""
    return index_dtype(-(-weight.shape[1] // weight.order_unit))


def index_dtype(entries: int) -> torch.dtype:
    """The smallest unsigned type that tells so many entries apart."""
    return torch.uint8 if entries <= 256 else torch.uint16 if entries <= 65536 else torch.uint32


def nbytes(weight: PackedWeight) -> dict[str, int]:
    """Stored bytes by part. Their sum is what the file holds for this matrix, padding included."""
    blocks = row_blocks(weight.shape[0])
    parts = dict.fromkeys(("codes", "scale", "zero", "offset", "channel_scale", "order", "channels"), 0)
    for segment in weight.segments:
        parts["codes"] += segment.codes.numel()
        parts["scale"] += blocks * 16 * segment.groups * segment.scale.element_size()
        if isinstance(segment.zero, Tensor):
            parts["zero"] += blocks * 2 * segment.bits * segment.groups
        if segment.offset is not None:
            parts["offset"] += blocks * 16 * segment.groups * segment.offset.element_size()
        if segment.channel_scale is not None:
            parts["channel_scale"] += segment.columns * segment.channel_scale.element_size()
    if weight.order is not None:
        parts["order"] = weight.order.numel() * order_dtype(weight).itemsize
    if weight.channels is not None:
        parts["channels"] = weight.shape[1] * index_dtype(weight.shape[1]).itemsize
    return parts


def bits_per_weight(weight: PackedWeight) -> float:
    """Stored bits per weight of the dense matrix, every byte counted."""
    return 8 * sum(nbytes(weight).values()) / (weight.shape[0] * weight.shape[1])

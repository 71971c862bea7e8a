"""The native format, version 1: a packed matrix as up to seven tensors (``docs/format.md`` is the specification).

    NAME.codes          uint8 [Ob, sum T * 64 * b]      by row block; inside one, all segments' tiles in order
    NAME.scale          16 bit [Ob, sum G, 16]
    NAME.zero           uint8 [Ob, sum 2 * b * G]       segments with packed zero-points
    NAME.offset         16 bit [Ob, sum G, 16]          segments with offsets
    NAME.channel_scale  16 bit [sum K]                  segments with channel scales
    NAME.order          unsigned [n]                    absent when natural or stored by another matrix
    NAME.channels       unsigned [I]                    where input channels are put into an order before the rotation

``Ob = ceil(O / 16)`` row blocks. Row blocks come first in every tensor but the last three, so a few rows (an embedding
lookup, a panel of a matrix product) are a slice of the file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfloor.core.bitpack import blocked, pack_zeros, unblocked, unpack_zeros
from bitfloor.core.channels import is_order
from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.packed import PackedWeight, Segment, centre, index_dtype, order_dtype
from bitfloor.formats.base import Get
from bitfloor.formats.layout import (
    CENTRE,
    LARGEST_ZERO,
    PACKED,
    Layout,
    code_bytes,
    groups,
    order_fault,
    part_shapes,
    tensor_names,
)

__all__ = ["assemble", "check_channels", "check_order", "decode", "encode", "layout", "reject", "tensor_names"]

SCALE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def reject(weight: PackedWeight) -> str | None:
    """Why version 1 cannot hold ``weight``, or None if it can."""
    if not weight.segments:
        return "it has no segments"
    position = 0
    dtype = weight.segments[0].scale.dtype
    for index, segment in enumerate(weight.segments):
        values = (segment.scale, segment.offset, segment.channel_scale)
        if dtype not in SCALE_NAMES or any(v is not None and v.dtype != dtype for v in values):
            return f"segment {index} mixes scale types; all scales, offsets and channel scales must be {dtype}"
        if segment.start != position:
            return f"segment {index} begins at column {segment.start}, not {position}"
        if (segment.zero is None) == (segment.offset is None):
            return f"segment {index} needs a zero-point or an offset, and not both"
        zero = segment.zero
        if isinstance(zero, Tensor) and zero.numel() and int(zero.max()) >> segment.bits:
            return f"segment {index} has a zero-point of {int(zero.max())}, too large for {segment.bits} bits"
        if isinstance(zero, float) and not zero.is_integer() and zero != centre(segment.bits):
            return f"segment {index} has a zero-point of {zero}, neither whole nor the centre of its levels"
        if isinstance(zero, int | float) and abs(zero) > LARGEST_ZERO:
            return f"segment {index} has a zero-point of {zero}, more than {LARGEST_ZERO} from 0"
        position = segment.stop
    if weight.channels is not None and not is_order(weight.channels.tolist(), weight.shape[1]):
        return f"its channels are no order of its {weight.shape[1]} columns"
    if weight.order is None:
        return None if position == weight.shape[1] else f"it stores {position} of {weight.shape[1]} columns, unordered"
    entries = -(-weight.shape[1] // weight.order_unit)
    if int(weight.order.min()) < 0 or int(weight.order.max()) >= entries:
        return f"its order names entry {int(weight.order.max())} of {entries}"
    return None


def layout(weight: PackedWeight, kind: str = "linear", transposed: bool = False) -> Layout:
    """Everything about ``weight`` but its tensors, as JSON.

    Args:
        weight: the packed matrix ``[O, I]``.
        kind: ``"linear"``, ``"conv1d"``, ``"expert"``, ``"embedding"`` or ``"head"``.
        transposed: the model's own parameter is ``[I, O]``.
    """
    found: Layout = {
        "shape": list(weight.shape),
        "kind": kind,
        "transposed": transposed,
        "scale_dtype": SCALE_NAMES[weight.segments[0].scale.dtype],
        "segments": [
            {
                "columns": segment.columns,
                "bits": segment.bits,
                "group_size": segment.group_size,
                "zero": _zero_kind(segment),
                "offset": segment.offset is not None,
                "channel_scale": segment.channel_scale is not None,
            }
            for segment in weight.segments
        ],
        "order": None if weight.order is None else {"unit": weight.order_unit, "count": weight.order.numel()},
    }
    if weight.rotation:
        found["rotation"] = weight.rotation
    if weight.channels is not None:
        found["channels"] = True
    return found


def _zero_kind(segment: Segment) -> str | int | None:
    zero = segment.zero
    if zero is None or isinstance(zero, Tensor):
        return None if zero is None else PACKED
    return CENTRE if zero == centre(segment.bits) else int(zero)


def encode(name: str, weight: PackedWeight, order_of: str | None = None) -> dict[str, Tensor]:
    """The tensors to store for a matrix.

    Args:
        name: name of the matrix, the prefix of the tensor names.
        weight: the packed matrix.
        order_of: the matrix that stores the same order; then none is stored here.

    Returns:
        Full tensor name to tensor, contiguous, on the device of ``weight``.

    Raises:
        BitfloorError: the format cannot hold this weight.
    """
    if reason := reject(weight):
        raise BitfloorError(f"{name} cannot be stored in bitfloor's format: {reason}.")
    segments = weight.segments
    blocks = segments[0].codes.shape[0]
    parts = {
        "codes": [segment.codes.reshape(blocks, -1) for segment in segments],
        "scale": [blocked(segment.scale) for segment in segments],
        "zero": [pack_zeros(s.zero, s.bits) for s in segments if isinstance(s.zero, Tensor)],
        "offset": [blocked(s.offset) for s in segments if s.offset is not None],
        "channel_scale": [s.channel_scale for s in segments if s.channel_scale is not None],
    }
    tensors = {
        f"{name}.{part}": torch.cat(values, dim=0 if part == "channel_scale" else 1).contiguous()
        for part, values in parts.items()
        if values
    }
    if weight.order is not None and order_of is None:
        tensors[f"{name}.order"] = weight.order.to(order_dtype(weight))
    if weight.channels is not None:
        tensors[f"{name}.channels"] = weight.channels.to(index_dtype(weight.shape[1]))
    return tensors


def decode(name: str, layout: Layout, get: Get, order_of: str | None = None) -> PackedWeight:
    """The packed matrix of stored tensors.

    Args:
        name: name of the matrix.
        layout: its layout, checked (:func:`bitfloor.formats.layout.check_layout`).
        get: returns a stored tensor by its full name.
        order_of: the matrix that stores this one's order, if another does.

    Raises:
        InputError: stored channels that are no order.
    """
    parts = {part: get(f"{name}.{part}") for part in part_shapes(layout, with_order=order_of is None)}
    if order_of is not None:
        parts["order"] = get(f"{order_of}.order")
    check_channels(name, parts.get("channels"))
    return assemble(layout, parts, layout["shape"][0])


def check_channels(name: str, channels: Tensor | None) -> None:
    """Refuse stored channels ``[I]`` that are no order: with one twice and one never, weights would be made up.

    Raises:
        InputError: naming the matrix.
    """
    if channels is not None and not is_order(channels.tolist(), channels.numel()):
        raise InputError(f"{name}.channels is no order of its {channels.numel()} input channels; copy the file again.")


def check_order(name: str, layout: Layout, order: Tensor) -> None:
    """Refuse a stored order that names channels which do not exist, or more or fewer than there are stored columns.

    Args:
        name: of the matrix that stores it.
        layout: its layout.
        order: as stored ``[count]``.

    Raises:
        InputError: naming the matrix.
    """
    if reason := order_fault(layout, order.tolist()):
        raise InputError(f"{name}.order {reason}; copy the file again.")


def assemble(layout: Layout, parts: Mapping[str, Tensor], rows: int) -> PackedWeight:
    """The packed matrix of some of a stored matrix's row blocks.

    Args:
        layout: the layout of the whole matrix.
        parts: part name (``"codes"``, ``"scale"``, ...) to tensor. All but ``channel_scale``, ``order`` and
            ``channels`` may hold any selection of the row blocks, the same in each.
        rows: rows to read from that selection, at most 16 a block.
    """
    segments = []
    start = at_code = at_group = at_zero = at_offset = at_channel = 0
    for described in layout["segments"]:
        columns, bits, count = described["columns"], described["bits"], groups(described)
        code_width = code_bytes(described)
        codes = parts["codes"][:, at_code : at_code + code_width]
        zero: Tensor | float | None = centre(bits) if described["zero"] == CENTRE else described["zero"]
        offset = channel_scale = None
        if zero == PACKED:
            zero = unpack_zeros(parts["zero"][:, at_zero : at_zero + 2 * bits * count], bits, rows, count)
            at_zero += 2 * bits * count
        if described["offset"]:
            offset = unblocked(parts["offset"][:, at_offset : at_offset + count], rows)
            at_offset += count
        if described["channel_scale"]:
            channel_scale = parts["channel_scale"][at_channel : at_channel + columns]
            at_channel += columns
        segments.append(
            Segment(
                start=start,
                stop=start + columns,
                bits=bits,
                group_size=described["group_size"],
                codes=codes.reshape(codes.shape[0], -1, 64 * bits),
                scale=unblocked(parts["scale"][:, at_group : at_group + count], rows),
                zero=zero,
                offset=offset,
                channel_scale=channel_scale,
            )
        )
        start, at_code, at_group = start + columns, at_code + code_width, at_group + count
    order = parts["order"].to(torch.int64) if layout["order"] is not None else None
    unit = layout["order"]["unit"] if layout["order"] is not None else 1
    channels = parts["channels"].to(torch.int64) if layout.get("channels") else None
    return PackedWeight((rows, layout["shape"][1]), tuple(segments), order, unit, layout.get("rotation", 0), channels)

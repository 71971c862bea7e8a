"""What the operators of packed matrices know of a matrix: its *form*, a list of whole numbers, and its parts.

    form = [O, I, order unit, order entries, rotation, channels, scale type,  (columns, bits, group size, zero,
            constant, scaled) for every segment]

Order unit and entries are 0 for natural order; ``channels`` is 1 where channels are put into an order before the
rotation; the scale type is 0 for float16 and 1 for bfloat16; ``zero`` is 0 for packed zero-points, 1 for offsets and
2 for a ``constant``, which is given in halves; ``scaled`` is 1 where there is a channel scale. The parts are the
tensors of ``docs/format.md`` in the order of ``PARTS``, those that the form implies and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from bitfloor.core.bitpack import LINES, ROWS, row_blocks, tiles, unblocked, unpack_zeros
from bitfloor.core.errors import InputError
from bitfloor.core.packed import PackedWeight, Segment, index_dtype
from bitfloor.core.spec import is_rotation

PARTS = ("codes", "scale", "zero", "offset", "channel_scale", "order", "channels")
WHOLE = ("channel_scale", "order", "channels")  # not by row block
SCALE_TYPES = (torch.float16, torch.bfloat16)
PACKED, OFFSET, CONSTANT = 0, 1, 2
HEADER, EACH = 7, 6
MOST = 1 << 30


@dataclass(frozen=True)
class SegmentForm:
    """One segment, see :class:`bitfloor.core.packed.Segment`."""

    columns: int
    bits: int
    group_size: int
    zero: int
    constant: int
    scaled: int

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group_size)

    @property
    def code_bytes(self) -> int:
        """Bytes of a row block."""
        return tiles(self.columns) * 64 * self.bits

    @property
    def activation_block(self) -> int:
        """Columns that share a scale when activations are rounded to int8; 0 where they are not.

        Few where codes are wide: rounding activations is the larger part of the error there (docs/decisions/0018).
        Groups that do not end with a tile are not worth a kernel, and stay float.
        """
        most = 128 if self.bits == 1 else 64 if self.bits < 4 else 32
        if self.groups == 1:
            return most
        return next((block for block in (128, 64, 32) if block <= most and self.group_size % block == 0), 0)


@dataclass(frozen=True)
class Form:
    """A checked form.

    Args:
        numbers: the list that it was read from.
    """

    numbers: tuple[int, ...]

    @cached_property
    def segments(self) -> tuple[SegmentForm, ...]:
        rest = self.numbers[HEADER:]
        return tuple(SegmentForm(*rest[at : at + EACH]) for at in range(0, len(rest), EACH))

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.numbers[0], self.numbers[1]

    @property
    def rotation(self) -> int:
        return self.numbers[4]

    @cached_property
    def padded(self) -> int:
        """Stored columns, every segment padded to whole tiles."""
        return sum(32 * tiles(segment.columns) for segment in self.segments)

    @cached_property
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of every part there is."""
        blocks, scale_type = row_blocks(self.shape[0]), SCALE_TYPES[self.numbers[6]]
        unit, count, channels = self.numbers[2], self.numbers[3], self.numbers[5]
        segments = self.segments
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (blocks, sum(s.code_bytes for s in segments))),
            "scale": (scale_type, (blocks, sum(s.groups for s in segments), ROWS)),
        }
        if packed := [s for s in segments if s.zero == PACKED]:
            found["zero"] = (torch.uint8, (blocks, sum(2 * s.bits * s.groups for s in packed)))
        if shifted := [s for s in segments if s.zero == OFFSET]:
            found["offset"] = (scale_type, (blocks, sum(s.groups for s in shifted), ROWS))
        if scaled := [s for s in segments if s.scaled]:
            found["channel_scale"] = (scale_type, (sum(s.columns for s in scaled),))
        if count:
            found["order"] = (index_dtype(-(-self.shape[1] // unit)), (count,))
        if channels:
            found["channels"] = (index_dtype(self.shape[1]), (self.shape[1],))
        return found

    def named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parts by name."""
        return dict(zip(self.parts, parts, strict=True))

    def check_parts(self, parts: Sequence[Tensor], device: torch.device) -> None:
        """Refuse parts that are not those of this form, or not where the input is.

        Raises:
            InputError: naming the part.
        """
        if len(parts) != len(self.parts):
            raise InputError(f"{len(parts)} parts were given, and the form of the matrix has {', '.join(self.parts)}.")
        for (name, (dtype, shape)), part in zip(self.parts.items(), parts, strict=True):
            if part.dtype != dtype or part.shape != shape:
                raise InputError(
                    f"{name} is {part.dtype} {list(part.shape)} and must be {dtype} {list(shape)} by the matrix's form."
                )
            if part.device != device:
                raise InputError(f"{name} is on {part.device} and the input on {device}; move one to the other.")

    def weight(self, parts: Sequence[Tensor], start: int = 0, stop: int | None = None) -> PackedWeight:
        """Rows ``start`` (a multiple of 16) to ``stop`` as a packed matrix."""
        stop = self.shape[0] if stop is None else stop
        rows, blocks = stop - start, slice(start // ROWS, -(-stop // ROWS))
        given = {name: part if name in WHOLE else part[blocks] for name, part in self.named(parts).items()}
        segments = []
        column = at_code = at_group = at_zero = at_offset = at_channel = 0
        for s in self.segments:
            zero: Tensor | float | None = s.constant / 2 if s.zero == CONSTANT else None
            offset = channel_scale = None
            if s.zero == PACKED:
                stored = given["zero"][:, at_zero : at_zero + 2 * s.bits * s.groups]
                zero = unpack_zeros(stored, s.bits, rows, s.groups)
                at_zero += 2 * s.bits * s.groups
            if s.zero == OFFSET:
                offset = unblocked(given["offset"][:, at_offset : at_offset + s.groups], rows)
                at_offset += s.groups
            if s.scaled:
                channel_scale = given["channel_scale"][at_channel : at_channel + s.columns]
                at_channel += s.columns
            codes = given["codes"][:, at_code : at_code + s.code_bytes]
            scale = unblocked(given["scale"][:, at_group : at_group + s.groups], rows)
            codes = codes.reshape(codes.shape[0], -1, 64 * s.bits)
            stop_column = column + s.columns
            segments.append(
                Segment(column, stop_column, s.bits, s.group_size, codes, scale, zero, offset, channel_scale)
            )
            column, at_code, at_group = stop_column, at_code + s.code_bytes, at_group + s.groups
        order = given["order"].to(torch.int64) if "order" in given else None
        channels = given["channels"].to(torch.int64) if "channels" in given else None
        unit = self.numbers[2] or 1
        return PackedWeight((rows, self.shape[1]), tuple(segments), order, unit, self.rotation, channels)


@lru_cache(maxsize=4096)
def read_form(numbers: tuple[int, ...]) -> Form:
    """The form behind a list of numbers.

    Raises:
        InputError: it is none; the number that is wrong.
    """
    if len(numbers) < HEADER + EACH or (len(numbers) - HEADER) % EACH:
        raise InputError(f"a form has {HEADER} numbers and {EACH} for every segment, and {len(numbers)} were given.")
    rows, inputs, unit, count, rotation, channels, scale_type = numbers[:HEADER]
    for name, value, right in (
        ("O", rows, 1 <= rows <= MOST),
        ("I", inputs, 1 <= inputs <= MOST),
        ("order unit", unit, 0 <= unit <= MOST and (unit > 0) == (count > 0)),
        ("order entries", count, 0 <= count <= MOST),
        ("rotation", rotation, rotation >= 0 and is_rotation(rotation)),
        ("channels", channels, channels in (0, 1)),
        ("scale type", scale_type, scale_type in (0, 1)),
    ):
        if not right:
            raise InputError(f"a form with {name} = {value} has no meaning; see bitfloor/ops/form.py.")
    form = Form(numbers)
    for index, s in enumerate(form.segments):
        if (
            s.columns < 1
            or s.bits not in LINES
            or s.group_size < 1
            or s.zero not in (0, 1, 2)
            or s.scaled not in (0, 1)
        ):
            raise InputError(f"segment {index} of a form, {s}, has no meaning; see bitfloor/ops/form.py.")
    stored = sum(s.columns for s in form.segments)
    if stored > MOST or (not unit and stored != inputs):
        raise InputError(f"a form stores {stored} columns of {inputs} in natural order; give an order or all columns.")
    return form

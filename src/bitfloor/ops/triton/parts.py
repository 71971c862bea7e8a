"""A packed matrix as the kernels of this folder take it: its parts by name, and what follows from its form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.basis import ordered, restored
from bitfloor.core.rotation import rotate
from bitfloor.ops import launch, packed_reference
from bitfloor.ops.form import Form

SIGNED = {torch.uint8: torch.int8, torch.uint16: torch.int16, torch.uint32: torch.int32}


@dataclass(frozen=True)
class Matrix:
    """A packed matrix on a device.

    Args:
        form: its form.
        parts: its parts by name, in one piece and where 16 bytes can be read at once; orders as signed numbers.
    """

    form: Form
    parts: dict[str, Tensor]

    @staticmethod
    def of(form: Form, parts: Sequence[Tensor]) -> Matrix:
        """From the parts that an operator is given; what lies badly is copied."""
        found = {}
        for name, part in form.named(parts).items():
            part = _placed(part)
            found[name] = part.view(SIGNED[part.dtype]) if name in ("order", "channels") else part
        return Matrix(form, found)

    @property
    def device(self) -> torch.device:
        return self.parts["codes"].device

    @property
    def aligned(self) -> bool:
        """Whether groups end with tiles."""
        return launch.aligned(self.form)

    @property
    def columns(self) -> int:
        """Stored columns, without padding."""
        return sum(segment.columns for segment in self.form.segments)

    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes as dwords, scales, zero-points as 16-bit words, offsets; something else where there are none."""
        codes, scale = self.parts["codes"].view(torch.int32), self.parts["scale"]
        zero = self.parts["zero"].view(torch.int16) if "zero" in self.parts else codes
        return codes, scale, zero, self.parts.get("offset", scale)

    def strides(self) -> tuple[int, int, int, int]:
        """Lines, groups, 16-bit words of zero-points and groups with offsets of a row block."""
        zero, offset = self.parts.get("zero"), self.parts.get("offset")
        words = 0 if zero is None else zero.shape[1] // 2
        lines, groups = self.parts["codes"].shape[1] // 64, self.parts["scale"].shape[1]
        return lines, groups, words, 0 if offset is None else offset.shape[1]

    def order(self) -> tuple[Tensor | None, int]:
        """The order of stored columns, and for how many channels an entry stands."""
        order, unit = self.parts.get("order"), self.form.numbers[2]
        if order is None or self.form.shape[1] % unit == 0:
            return order, unit or 1
        # The last channels fill no whole entry, and where that entry stands is not known here.
        return self.index().to(torch.int32), 1

    def index(self) -> Tensor:
        """Input channel of every stored column, int64, in shapes that do not depend on values."""
        unit, inputs, columns = self.form.numbers[2], self.form.shape[1], self.columns
        order = _wide(self.parts["order"])
        index = (order.unsqueeze(1) * unit + torch.arange(unit, device=order.device)).reshape(-1)
        there = index < inputs
        place = torch.where(there, there.cumsum(0) - 1, columns).clamp_max(columns)
        return index.new_zeros(columns + 1).scatter_(0, place, index)[:-1]

    def turned(self, x: Tensor) -> Tensor:
        """``x P R`` of ``[..., I]``, in its dtype."""
        return rotate(ordered(x, self._channels()), self.form.rotation)

    def turned_back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`turned`."""
        return restored(rotate(x, self.form.rotation), self._channels())

    def in_order(self, x: Tensor) -> Tensor:
        """``[..., I]`` to stored order ``[..., stored columns]``."""
        return x.index_select(-1, self.index()) if "order" in self.parts else x

    def natural(self, stored: Tensor) -> Tensor:
        """``[..., stored columns]`` where they belong, ``[..., I]``: those of one channel are added."""
        if "order" not in self.parts:
            return stored
        return stored.new_zeros(*stored.shape[:-1], self.form.shape[1]).index_add_(-1, self.index(), stored)

    def padded(self, x: Tensor) -> Tensor:
        """``[rows, stored columns]`` with zeros up to whole tiles behind every segment, or itself if all are whole."""
        if self.form.padded == x.shape[1]:
            return _placed(x)
        out, at, column = x.new_zeros(x.shape[0], self.form.padded), 0, 0
        for segment in self.form.segments:
            out[:, at : at + segment.columns] = x[:, column : column + segment.columns]
            at += segment.columns + -segment.columns % 32
            column += segment.columns
        return out

    def unpadded(self, stored: Tensor, int8: bool = False) -> Tensor:
        """``[..., padded]`` without padding, rounded as int8 activations are if wanted."""
        if self.form.padded == self.columns and not int8:
            return stored
        found, at = [], 0
        for segment in self.form.segments:
            own = stored[..., at : at + segment.columns]
            found.append(packed_reference.rounded(own, segment.activation_block) if int8 else own)
            at += segment.columns + -segment.columns % 32
        return torch.cat(found, dim=-1)

    def _channels(self) -> Tensor | None:
        return _wide(self.parts["channels"]) if "channels" in self.parts else None


def _wide(index: Tensor) -> Tensor:
    """Entries of an order as int64."""
    return index.to(torch.int64) & ((1 << 8 * index.element_size()) - 1)


def _placed(tensor: Tensor) -> Tensor:
    """In one piece, and where 16 bytes can be read at once."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor

"""The scales of a packed matrix as something to learn, its codes as they are.

    by zero-point    w_hat = (q - z) s        s = s0 f        dL/df_g = s0_g sum_{j in g} dL/dw_hat_j (q_j - z)
    by offset        w_hat = q s + o                          dL/df_g = s0_g sum_{j in g} dL/dw_hat_j (q_j - h)
                     o = o0 + (s0 - s) h      h = (2^b - 1) / 2

``f`` starts at 1. A group with an offset (one bit, as a rule) keeps its middle ``o0 + s0 h``: its levels move apart or
together around it. Scale and offset are rounded through their storage type at every step, with gradient one, so what
is learned is what is stored. End-to-end learning of scales with frozen codes is the second phase of EfficientQAT (arXiv
2407.11062), there with the next token as the target and zero-points only.

A matrix that is stored rotated is rotated back on the way out, and its gradient on the way in; the same goes for the
order of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitfloor.core.affine import stored, stored_scale
from bitfloor.core.basis import Basis
from bitfloor.core.channels import pack_order
from bitfloor.core.packed import PackedWeight, Segment, column_index, segment_codes
from bitfloor.solvers.ranges import grouped


def tunable(weight: PackedWeight) -> bool:
    """Whether the scales of a matrix can be learnt: it has no channel scales. Others stay as they are."""
    return all(segment.channel_scale is None for segment in weight.segments)


class SegmentScales:
    """The learnable scales of one segment ``[O, K]``.

    Args:
        segment: without channel scales; its codes are unpacked to a byte each (two at 8 bits with zero-points).
        factor: ``f [O, G]`` float32, held and not copied; whoever made it changes it.
    """

    def __init__(self, segment: Segment, factor: Tensor) -> None:
        self.columns, self.size = segment.columns, segment.group_size
        self.start, self.low, self.factor = segment.scale, segment.offset, factor
        self.unit = 1.0  # of what is held of a code
        # A short last group is padded; its padding is cut off wherever weights come out.
        codes = segment_codes(segment, len(factor))
        if segment.offset is not None:
            self.middle = ((1 << segment.bits) - 1) / 2
            self.codes = grouped(codes, segment.group_size)
        else:
            self.middle = 0.0
            given = segment.zero
            zero = given if isinstance(given, Tensor) else torch.full_like(segment.scale, float(given or 0))
            # In halves where the zero-point is one, so that they are whole.
            self.unit = 1.0 if isinstance(given, Tensor) or float(given or 0).is_integer() else 0.5
            centred = grouped(codes.float(), segment.group_size).sub_(zero.float().unsqueeze(-1)).div_(self.unit)
            self.codes = centred.to(torch.int8 if segment.bits < 8 else torch.int16)

    def values(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset (None where there are zero-points), ``[O, G]`` float32, as stored."""
        start = self.start.float()
        scale = stored_scale(start * self.factor, self.start.dtype)
        if self.low is None:
            return scale, None
        # Not the middle less half a scale: that would lose a small offset beside a large scale before anything moved.
        return scale, stored(self.low.float() + (start - scale) * self.middle, self.low.dtype)

    def dense(self) -> Tensor:
        """The weights ``[O, K]`` float32 in stored column order, at the present factors."""
        scale, offset = self.values()
        wide = self.codes.float().mul_(scale.unsqueeze(-1) * self.unit)
        if offset is not None:
            wide.add_(offset.unsqueeze(-1))
        return wide.flatten(1)[:, : self.columns].contiguous()

    def gradient(self, grad: Tensor) -> Tensor:
        """``dL/df [O, G]`` from the gradient ``[O, K]`` float32 with respect to :meth:`dense`."""
        flow = grouped(grad, self.size)
        found = (flow * self.codes).sum(-1) * self.unit
        if self.low is not None:
            found -= flow.sum(-1) * self.middle
        return found * self.start.float()


class TunedScales:
    """The learnable scales of one packed matrix, of all its segments.

    Args:
        weight: see :func:`tunable`; nothing else of it is kept than codes, group values and the order of its columns.

    Attributes:
        factor: ``f [O, G]`` float32, the groups of all segments beside each other, as their scales are stored.

    Raises:
        ValueError: a matrix that is not tunable.
    """

    def __init__(self, weight: PackedWeight) -> None:
        if not tunable(weight):
            raise ValueError("a matrix with channel scales has no scales to tune")
        self.shape, self.dtype = weight.shape, weight.segments[0].scale.dtype
        self.basis = Basis(b"" if weight.channels is None else pack_order(weight.channels.tolist()), weight.rotation)
        groups = [segment.groups for segment in weight.segments]
        self.factor = torch.ones(weight.shape[0], sum(groups), device=weight.segments[0].scale.device)
        factors = torch.split(self.factor, groups, dim=1)
        self.segments = [SegmentScales(*pair) for pair in zip(weight.segments, factors, strict=True)]
        # Where each segment's columns belong; None for one segment in natural order.
        self.places: Sequence[Tensor] | None = None
        index = column_index(weight)
        if index is None and len(groups) > 1:
            index = torch.arange(weight.shape[1], device=self.factor.device)
        if index is not None:
            self.places = torch.split(index.to(torch.int32), [segment.columns for segment in weight.segments])

    def tensors(self) -> dict[str, Tensor]:
        """What is stored at the present factors, by part: ``scale [O, G]``, and ``offset`` of the groups with one."""
        values = [segment.values() for segment in self.segments]
        parts = {"scale": [scale for scale, _ in values], "offset": [low for _, low in values if low is not None]}
        return {part: torch.cat(found, dim=1).to(self.dtype) for part, found in parts.items() if found}

    def dense(self) -> Tensor:
        """The weight ``[O, I]`` float32 at the present factors."""
        if self.places is None:
            return self.basis.back(self.segments[0].dense())
        wide = torch.zeros(self.shape, device=self.factor.device)
        for segment, places in zip(self.segments, self.places, strict=True):
            wide.index_add_(1, places, segment.dense())
        return self.basis.back(wide)

    def gradient(self, grad: Tensor) -> Tensor:
        """``dL/df [O, G]`` from the gradient ``[O, I]`` with respect to :meth:`dense`."""
        flow = self.basis.to(grad.float())
        if self.places is None:
            return self.segments[0].gradient(flow)
        pairs = zip(self.segments, self.places, strict=True)
        return torch.cat([segment.gradient(flow.index_select(1, places)) for segment, places in pairs], dim=1)

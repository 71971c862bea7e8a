"""The scales of a packed matrix as something to learn, its codes as they are.

    w_hat = (q - z) s        s = s0 f        dL/df_g = s0_g sum_{j in g} dL/dw_hat_j (q_j - z)

``f [O, G]`` starts at 1. The scale is rounded through its storage type at every step, with gradient one, so what is
learned is what is stored. End-to-end learning of scales with frozen codes is the second phase of EfficientQAT (arXiv
2407.11062), there with the next token as the target.

A matrix that is stored rotated is rotated back on the way out, and its gradient on the way in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import stored_scale
from bitfloor.core.packed import PackedWeight, segment_codes
from bitfloor.core.rotation import rotate
from bitfloor.solvers.ranges import grouped


def tunable(weight: PackedWeight) -> bool:
    """Whether a matrix is one segment with zero-points in natural order; others keep their scales."""
    first = weight.segments[0]
    return len(weight.segments) == 1 and first.zero is not None and first.channel_scale is None and weight.order is None


class TunedScales:
    """The learnable scales of one packed matrix.

    Args:
        weight: see :func:`tunable`; its codes are unpacked to a byte each, and nothing else of it is kept.

    Raises:
        ValueError: a matrix that is not tunable.
    """

    def __init__(self, weight: PackedWeight) -> None:
        if not tunable(weight):
            raise ValueError("only a matrix of one segment with zero-points has scales to tune")
        segment = weight.segments[0]
        self.rotation = weight.rotation
        self.shape, self.size, self.stored = weight.shape, segment.group_size, segment.scale.dtype
        given = segment.zero
        zero = given if isinstance(given, Tensor) else torch.full_like(segment.scale, float(given or 0))
        small = torch.int8 if segment.bits < 8 else torch.int16
        codes = grouped(segment_codes(segment, weight.shape[0]).to(torch.int16), segment.group_size)
        # A short last group is padded; its padding is cut off wherever weights come out.
        self.centred = (codes - zero.to(torch.int16).unsqueeze(-1)).to(small)
        self.start = segment.scale.float()
        self.factor = torch.ones_like(self.start)

    def scale(self) -> Tensor:
        """``[O, G]`` float32, as stored."""
        return stored_scale(self.start * self.factor, self.stored)

    def dense(self) -> Tensor:
        """The weight ``[O, I]`` float32 at the present factors."""
        wide = self.centred.float().mul_(self.scale().unsqueeze(-1))
        return rotate(wide.flatten(1)[:, : self.shape[1]].contiguous(), self.rotation)

    def gradient(self, grad: Tensor) -> Tensor:
        """``dL/df [O, G]`` from the gradient ``[O, I]`` with respect to :meth:`dense`."""
        return (grouped(rotate(grad.float(), self.rotation), self.size) * self.centred).sum(-1) * self.start

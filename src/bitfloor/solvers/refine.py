"""Learned rounding that starts from a solution: codes and grid of GPTQ, or of any other method.

| symbol | here | meaning |
| --- | --- | --- |
| ``q0, s0, z0`` | codes, grid | where it starts |
| ``u`` | ``weight`` ``[O, I]`` | latent weight: rounds to ``q0``, and lies as near to ``w`` as that allows |
| ``V`` | ``shift`` ``[O, I]`` | learned, starts at 0 |
| ``gamma`` | ``factor`` ``[O, G]`` | learned factor on the scale, starts at 1, between 0 and 2 |
| ``Z`` | ``move`` ``[O, G]`` | learned move of the zero-point, if asked for; starts at 0 |

    s = gamma s0        w_hat = (clamp(round(u / s + z + V), 0, 2^b - 1) - z) s        z = clamp(round(z0 + Z))
    u / s0 + z = clamp(w / s0 + z, q0 - m, q0 + m)        m = 0.49

Sign steps as in :mod:`bitfloor.solvers.signround`, with the scale's factor in the place of the range's two. The latent
weight carries what the start knows: a code that was moved away from the nearest one for the sake of others lies at the
border and goes back after one step, one that was nearest lies where ``w`` lies. A latent weight in the middle of its
code would forget that; all codes then flip at the same step, and learning diverges.

One-bit groups have an offset ``o`` instead of a zero-point: ``z = -o / s`` is no whole number, and is made of the
offset as stored at every step. It moves with the rounding, in steps of the same size.

A move of the zero-point shifts code and zero-point alike, so it changes those weights only that are clamped (none is at
the start), and it is rounded, so its steps must sum to a half before anything changes:
``dL/dz = s sum_j g (m - 1)`` with ``m`` one where a code is not. Instead of by signs, everything may move by AdamW, on
the gradients ``dL/dV = s m g``, ``dL/dgamma = s0 dL/ds`` and the above.

After the factor on the scale of SignRoundV2 (arXiv 2512.04746), which starts from a searched scale and no codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, stored, stored_scale
from bitfloor.core.packed import centre, expand_groups
from bitfloor.ops import rounding
from bitfloor.solvers.adamw import AdamW
from bitfloor.solvers.ranges import grouped

MARGIN = 0.49
WIDEST = 2.0  # largest factor on a scale


class Refinement:
    """The learnable rounding of one matrix, from a start.

    Args:
        weight: ``[O, I]`` float32, what is to be approximated; not changed.
        codes: ``[O, I]`` uint8 of the start.
        grid: of the start, all groups of one width, with zero-points, or with offsets if that is one bit.
        tune_scale: learn the factors; otherwise only ``V``.
        zero_share: step of the zero-points' moves, of the rounding's step; 0 keeps them. They stay in any case where
            they are not stored (a symmetric grid, or a centred one).
        adam: moves everything, with moments kept in it; None takes steps of the signs.

    Raises:
        ValueError: a grid of several widths, or with offsets and more than one bit.
    """

    def __init__(
        self,
        weight: Tensor,
        codes: Tensor,
        grid: Grid,
        *,
        tune_scale: bool = True,
        zero_share: float = 0.0,
        adam: AdamW | None = None,
    ) -> None:
        self.bits = int(grid.bits[0])
        one_bit = grid.zero is None and self.bits == 1
        if (grid.zero is None and not one_bit) or not bool((grid.bits == self.bits).all()):
            raise ValueError("refinement needs a grid of one width, with zero-points where that is more than one bit")
        self.start = grid
        self.offset_form = one_bit
        self.first = -grid.shift / grid.scale if grid.zero is None else grid.zero
        stays = grid.constant_zero or bool((self.first == centre(self.bits)).all())
        self.zero_share = 1.0 if one_bit else 0.0 if stays else zero_share
        self.adam, self.steps = adam, 0
        self.size = grid.group_size
        self.tune_scale = tune_scale
        self.weight = latent(weight, codes, grid.scale, self.first, self.size)
        self.shift = torch.zeros_like(self.weight)
        self.factor = torch.ones_like(grid.scale)
        self.move = torch.zeros_like(grid.scale) if self.zero_share else None

    def grid(self) -> Grid:
        """The grid of the present factors; at the start the one given, bit for bit."""
        start, scale = self.start, self._scale()
        zero, offset = (None, self._offset(scale)) if self.offset_form else (self._zero(scale), None)
        return Grid(scale, zero, offset, start.bits, self.size, start.constant_zero, start.scale_dtype)

    def fake_quantized(self) -> Tensor:
        """``w_hat [O, I]`` float32 at the present parameters, outside of any graph."""
        scale = self._scale()
        return rounding.fake_quantize(self.weight, self.shift, scale, self._zero(scale), self.bits, self.size)

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """One step against the sign of the gradients.

        Args:
            grad: ``[O, I]`` gradient of the loss with respect to :meth:`fake_quantized`; any positive scale.
            rate: step of ``V``, in steps of the grid.
            range_rate: step of the factors.
        """
        scale, grad = self._scale(), grad.float().contiguous()
        zero = self._zero(scale)
        inside = None if self.adam is None else self._inside(scale, zero)
        # With AdamW only the sums are wanted, so the shift takes a step of nothing.
        by_sign = rate if self.adam is None else 0.0
        towards, clipped = rounding.sign_step(self.weight, self.shift, scale, zero, grad, by_sign, self.bits, self.size)
        self.steps += 1
        if inside is not None:
            wide = expand_groups(scale, self.size, grad.shape[1])
            self._moved("shift", self.shift, grad * wide * inside, rate)
        if self.tune_scale:
            self._moved("factor", self.factor, towards * self.start.scale, range_rate).clamp_(0.0, WIDEST)
        if self.move is not None:
            self._moved("move", self.move, clipped * scale, self.zero_share * rate)

    def _moved(self, name: str, parameter: Tensor, grad: Tensor, rate: float) -> Tensor:
        """One parameter, one step further, in place."""
        if self.adam is None:
            return parameter.sub_(rate * torch.sign(grad))
        self.adam.step(name, parameter, grad, rate, self.steps)
        return parameter

    def _inside(self, scale: Tensor, zero: Tensor) -> Tensor:
        """``[O, I]`` bool: which codes are not clamped."""
        wide, middle = (expand_groups(part, self.size, self.weight.shape[1]) for part in (scale, zero))
        code = torch.round((self.weight + middle * wide) / wide + self.shift)
        return (code >= 0.0) & (code <= float((1 << self.bits) - 1))

    def _zero(self, scale: Tensor) -> Tensor:
        """Zero-points ``[O, G]``; whole numbers unless offsets are stored, then those that give them."""
        if self.offset_form:
            return -self._offset(scale) / scale
        if self.move is None:
            return self.first
        return torch.round(self.first + self.move).clamp_(0.0, float((1 << self.bits) - 1))

    def _offset(self, scale: Tensor) -> Tensor:
        """Offsets ``[O, G]``, as stored."""
        assert self.move is not None
        return stored(-(self.first + self.move) * scale, self.start.scale_dtype)

    def snapshot(self) -> tuple[Tensor, Grid]:
        """Codes ``[O, I]`` uint8 and grid, all that is needed of the best step."""
        grid = self.grid()
        zero = self._zero(grid.scale)
        return rounding.codes(self.weight, self.shift, grid.scale, zero, self.bits, self.size), grid

    def _scale(self) -> Tensor:
        """``[O, G]`` as stored."""
        return stored_scale(self.start.scale * self.factor, self.start.scale_dtype)


def latent(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """``[O, I]`` float32: as near to ``weight`` as rounding to ``codes`` allows.

    Args:
        weight: ``[O, I]`` float32.
        codes: ``[O, I]`` uint8.
        scale, zero: ``[O, G]`` of the grid.
        group_size: columns of a group.
    """
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    exact = grouped(weight, group_size) / scale + zero
    middle = grouped(codes.float(), group_size)
    inside = torch.maximum(torch.minimum(exact, middle + MARGIN), middle - MARGIN)
    return ((inside - zero) * scale).flatten(1)[:, : weight.shape[1]].contiguous()

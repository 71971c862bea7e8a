"""SignRound: learned rounding and clipping by signed gradient descent (arXiv 2309.05516).

| symbol | here | meaning |
| --- | --- | --- |
| ``V`` | ``shift`` ``[O, I]`` | added to ``w / s`` before rounding, starts at 0 |
| ``alpha, beta`` | ``low``, ``high`` ``[O, G]`` | factors on a group's minimum and maximum, from 1 down to 0 |
| ``s, z`` | scale, zero-point | of a group, from ``alpha min`` and ``beta max`` |
| ``g`` | ``grad`` ``[O, I]`` | gradient of the loss with respect to the fake-quantized weight |
| ``m`` | | 1 where the code was not clamped, else 0 |

Symmetric, full range, ``Q = 2^(b-1)`` (section 3 of the paper, with the signed scale of its code)::

    A = -alpha min(w, 0)    B = beta max(w, 0)    s = +max(A, B) / Q where A > B, else -max(A, B) / Q
    w_hat = s clamp(round(w / s + V), -Q, Q - 1)

Asymmetric, ``n = 2^b - 1``::

    s = (beta max(w, 0) - alpha min(w, 0)) / n    z = round(-alpha min(w, 0) / s)
    w_hat = s (clamp(round(w / s + V) + z, 0, n) - z)

Rounding has gradient one, the clamp ``m``, and rounding the scale to its storage type one. Only signs of gradients are
used, so they are never stored: :meth:`SignRound.step` goes from ``g`` to the updated parameters in one pass over the
matrix, which with the one that rounds is in :mod:`bitfloor.ops.rounding`.

    dL/dV     = s m g
    dL/ds     = sum_j g (q - m w / s)                                  symmetric
    dL/dA     = dL/ds / (+-Q) where A is the larger, else 0;           dL/dalpha = -min dL/dA, likewise for B
    dL/ds     = sum_j g (q - z - m w / s) + dL/dz alpha min / s^2      asymmetric
    dL/dz     = sum_j g s (m - 1)
    dL/dalpha = -min (dL/ds / n + dL/dz / s)      dL/dbeta = max dL/ds / n

Deviations: the zero-point is added before rounding, not after, so that the start is the project's round-to-nearest bit
for bit (the two differ at exact ties only); at a tie of ``A`` and ``B`` both factors move (automatic differentiation
gives each half the gradient, whose sign is the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, stored_scale
from bitfloor.core.spec import QuantSpec
from bitfloor.ops import rounding
from bitfloor.solvers.ranges import group_bits, grouped


class SignRound:
    """The learnable rounding of one matrix.

    Args:
        weight: ``[O, I]`` float32; kept, not changed (a dense copy, if its rows are not dense).
        spec: width (2 bits or more), grouping, symmetry, storage type.
        tune_range: learn ``alpha`` and ``beta``; otherwise only ``V``.

    Raises:
        ValueError: one bit, which has no affine grid with a zero-point.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, *, tune_range: bool = True) -> None:
        if spec.bits < 2:
            raise ValueError("SignRound needs at least 2 bits")
        self.weight = weight.contiguous()
        self.spec = spec
        self.size = spec.columns_per_group(weight.shape[1])
        self.tune_range = tune_range
        groups = -(-weight.shape[1] // self.size)
        shape = (weight.shape[0], groups)
        self.shift = torch.zeros_like(self.weight)
        self.low = torch.ones(shape, device=weight.device)
        self.high = torch.ones(shape, device=weight.device)
        parts = grouped(weight, self.size)
        self._min = parts.amin(-1).clamp_max(0.0)
        self._max = parts.amax(-1).clamp_min(0.0)

    def grid(self) -> Grid:
        """The grid of the present ranges; at the start the min-max grid, bit for bit."""
        dtype = getattr(torch, self.spec.scale_dtype)
        widths = group_bits(self.spec, self.low.shape[1]).to(self.weight.device)
        scale, zero = self._scale_and_zero()
        return Grid(scale, zero, None, widths, self.size, constant_zero=self.spec.symmetric, scale_dtype=dtype)

    def codes(self) -> Tensor:
        """The present codes ``[O, I]`` uint8."""
        return rounding.codes(self.weight, self.shift, *self._scale_and_zero(), self.spec.bits, self.size)

    def fake_quantized(self) -> Tensor:
        """``w_hat [O, I]`` float32 at the present parameters, outside of any graph."""
        return rounding.fake_quantize(self.weight, self.shift, *self._scale_and_zero(), self.spec.bits, self.size)

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """One step against the sign of the gradients.

        Args:
            grad: ``[O, I]`` gradient of the loss with respect to :meth:`fake_quantized`; any positive scale.
            rate: step of ``V``, in steps of the grid.
            range_rate: step of ``alpha`` and ``beta``.
        """
        scale, zero = self._scale_and_zero()
        gradient = grad.float().contiguous()
        towards, clipped = rounding.sign_step(
            self.weight, self.shift, scale, zero, gradient, rate, self.spec.bits, self.size
        )
        if self.tune_range and self.spec.symmetric:
            self._step_symmetric(towards, scale, range_rate)
        elif self.tune_range:
            self._step_asymmetric(towards, clipped * scale, scale, range_rate)

    def snapshot(self) -> tuple[Tensor, Grid]:
        """Codes and grid, all that is needed of the best step: a quarter of the memory of the parameters or less."""
        return self.codes(), self.grid()

    def _step_symmetric(self, towards: Tensor, scale: Tensor, rate: float) -> None:
        below, above = -self.low * self._min, self.high * self._max
        slope = torch.sign(towards) * torch.sign(scale)
        self._move(self.low, slope * ((below >= above) & (self._min < 0)), rate)
        self._move(self.high, slope * ((above >= below) & (self._max > 0)), rate)

    def _step_asymmetric(self, towards: Tensor, clipped: Tensor, scale: Tensor, rate: float) -> None:
        top = float((1 << self.spec.bits) - 1)
        towards = towards + clipped * self.low * self._min / scale.square()
        self._move(self.low, torch.sign(-self._min * (towards / top + clipped / scale)), rate)
        self._move(self.high, torch.sign(self._max * towards), rate)

    @staticmethod
    def _move(factor: Tensor, sign: Tensor, rate: float) -> None:
        factor.sub_(rate * sign).clamp_(0.0, 1.0)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Scale and zero-point ``[O, G]``, as stored."""
        dtype = getattr(torch, self.spec.scale_dtype)
        below, above = -self.low * self._min, self.high * self._max
        if self.spec.symmetric:
            half = float(1 << (self.spec.bits - 1))
            empty = (self._min == 0) & (self._max == 0)
            largest = torch.where(below > above, below, -above)
            scale = torch.where(empty, torch.ones_like(largest), largest) / half
            return stored_scale(scale, dtype), torch.full_like(below, half)
        top = float((1 << self.spec.bits) - 1)
        empty = self._min == self._max  # both are zero: the range always includes it
        scale = stored_scale(torch.where(empty, torch.ones_like(below), (above + below) / top), dtype)
        return scale, torch.round(below / scale).clamp_(0.0, top)

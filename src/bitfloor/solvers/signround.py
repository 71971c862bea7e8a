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
used, so they are never stored: :meth:`SignRound.step` goes from ``g`` to the updated parameters in one pass.

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

from collections.abc import Iterator

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, stored_scale
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.ranges import group_bits, grouped

CHUNK = 1 << 19  # weights treated at once, so that the passes of a step stay in the caches


class SignRound:
    """The learnable rounding of one matrix.

    Args:
        weight: ``[O, I]`` float32; kept, not changed.
        spec: width (2 bits or more), grouping, symmetry, storage type.
        tune_range: learn ``alpha`` and ``beta``; otherwise only ``V``.

    Raises:
        ValueError: one bit, which has no affine grid with a zero-point.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, *, tune_range: bool = True) -> None:
        if spec.bits < 2:
            raise ValueError("SignRound needs at least 2 bits")
        self.weight = weight
        self.spec = spec
        self.size = spec.columns_per_group(weight.shape[1])
        self.tune_range = tune_range
        groups = -(-weight.shape[1] // self.size)
        shape = (weight.shape[0], groups)
        self.shift = torch.zeros_like(weight)
        self.low = torch.ones(shape, device=weight.device)
        self.high = torch.ones(shape, device=weight.device)
        parts = grouped(weight, self.size)
        self._min = parts.amin(-1).clamp_max(0.0)
        self._max = parts.amax(-1).clamp_min(0.0)

    def grid(self) -> Grid:
        """The grid of the present ranges; at the start the min-max grid, bit for bit."""
        dtype = getattr(torch, self.spec.scale_dtype)
        widths = group_bits(self.spec, self.low.shape[1]).to(self.weight.device)
        scale, zero = self._scale_and_zero(slice(None))
        return Grid(scale, zero, None, widths, self.size, constant_zero=self.spec.symmetric, scale_dtype=dtype)

    def codes(self) -> Tensor:
        """The present codes ``[O, I]`` uint8."""
        out = torch.empty(self.weight.shape, dtype=torch.uint8, device=self.weight.device)
        for rows in self._chunks():
            scale, zero = self._scale_and_zero(rows)
            code, _ = self._round(rows, scale, zero)
            out[rows] = self._flat(code).to(torch.uint8)
        return out

    def fake_quantized(self) -> Tensor:
        """``w_hat [O, I]`` float32 at the present parameters, outside of any graph."""
        out = torch.empty_like(self.weight)
        for rows in self._chunks():
            scale, zero = self._scale_and_zero(rows)
            code, _ = self._round(rows, scale, zero)
            out[rows] = self._flat((code - zero.unsqueeze(-1)) * scale.unsqueeze(-1))
        return out

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """One step against the sign of the gradients.

        Args:
            grad: ``[O, I]`` gradient of the loss with respect to :meth:`fake_quantized`; any positive scale.
            rate: step of ``V``, in steps of the grid.
            range_rate: step of ``alpha`` and ``beta``.
        """
        for rows in self._chunks():
            scale, zero = self._scale_and_zero(rows)
            code, inside = self._round(rows, scale, zero)
            gradient = grouped(grad[rows].float(), self.size)
            wide = scale.unsqueeze(-1)
            moved = torch.sign(gradient).mul_(inside).mul_(torch.sign(wide))
            if self.tune_range:
                centred = code - zero.unsqueeze(-1)
                exact = grouped(self.weight[rows], self.size) / wide
                towards = (gradient * (centred - inside * exact)).sum(-1)
                if self.spec.symmetric:
                    self._step_symmetric(rows, towards, scale, range_rate)
                else:
                    clipped = (gradient * (inside - 1.0)).sum(-1) * scale
                    self._step_asymmetric(rows, towards, clipped, scale, range_rate)
            self.shift[rows] -= rate * self._flat(moved)

    def snapshot(self) -> tuple[Tensor, Grid]:
        """Codes and grid, all that is needed of the best step: a quarter of the memory of the parameters or less."""
        return self.codes(), self.grid()

    def _step_symmetric(self, rows: slice, towards: Tensor, scale: Tensor, rate: float) -> None:
        below, above = -self.low[rows] * self._min[rows], self.high[rows] * self._max[rows]
        slope = torch.sign(towards) * torch.sign(scale)
        self._move(self.low, rows, slope * ((below >= above) & (self._min[rows] < 0)), rate)
        self._move(self.high, rows, slope * ((above >= below) & (self._max[rows] > 0)), rate)

    def _step_asymmetric(self, rows: slice, towards: Tensor, clipped: Tensor, scale: Tensor, rate: float) -> None:
        low, top = self._min[rows], float((1 << self.spec.bits) - 1)
        towards = towards + clipped * self.low[rows] * low / scale.square()
        self._move(self.low, rows, torch.sign(-low * (towards / top + clipped / scale)), rate)
        self._move(self.high, rows, torch.sign(self._max[rows] * towards), rate)

    @staticmethod
    def _move(factor: Tensor, rows: slice, sign: Tensor, rate: float) -> None:
        factor[rows] = (factor[rows] - rate * sign).clamp_(0.0, 1.0)

    def _scale_and_zero(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scale and zero-point ``[O, G]`` of some rows, as stored."""
        dtype = getattr(torch, self.spec.scale_dtype)
        below, above = -self.low[rows] * self._min[rows], self.high[rows] * self._max[rows]
        if self.spec.symmetric:
            half = float(1 << (self.spec.bits - 1))
            empty = (self._min[rows] == 0) & (self._max[rows] == 0)
            largest = torch.where(below > above, below, -above)
            scale = torch.where(empty, torch.ones_like(largest), largest) / half
            return stored_scale(scale, dtype), torch.full_like(below, half)
        top = float((1 << self.spec.bits) - 1)
        empty = self._min[rows] == self._max[rows]  # both are zero: the range always includes it
        scale = stored_scale(torch.where(empty, torch.ones_like(below), (above + below) / top), dtype)
        return scale, torch.round(below / scale).clamp_(0.0, top)

    def _round(self, rows: slice, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[O, G, g]`` as float, and 1.0 where they were not clamped."""
        top = float((1 << self.spec.bits) - 1)
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        exact = (grouped(self.weight[rows], self.size) + zero * scale) / scale  # as core.affine.encode has it
        code = torch.round(exact + grouped(self.shift[rows], self.size))
        inside = ((code >= 0.0) & (code <= top)).to(code.dtype)
        return code.clamp_(0.0, top), inside

    def _flat(self, groups: Tensor) -> Tensor:
        """``[O, G, g]`` back to ``[O, I]``, the padding of a short last group dropped."""
        return groups.reshape(groups.shape[0], -1)[:, : self.weight.shape[1]]

    def _chunks(self) -> Iterator[slice]:
        rows = max(1, CHUNK // self.weight.shape[1])
        return (slice(begin, begin + rows) for begin in range(0, self.weight.shape[0], rows))

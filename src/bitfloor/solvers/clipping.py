"""Learnable weight clipping: how much of a group's range its grid spans (OmniQuant, arXiv 2308.13137, equation 2).

| symbol | here | meaning |
| --- | --- | --- |
| ``l, u`` | ``low``, ``high`` ``[O, G]`` | logits of the factors on a group's minimum and maximum, 4 at the start |
| ``s, z`` | scale, zero-point | of a group, from ``sigmoid(l) min`` and ``sigmoid(u) max`` |
| ``c`` | | code, ``clamp(round(w / s + z), 0, n)`` |
| ``g`` | ``grad`` ``[O, I]`` | gradient of the loss with respect to the fake-quantized weight |
| ``m`` | | 1 where the code was not clamped, else 0 |

Two bits and more, :class:`Clipping`; asymmetric, ``n = 2^b - 1``::

    A = -sigmoid(l) min(w, 0)    B = sigmoid(u) max(w, 0)    s = (A + B) / n    z = round(A / s)    w_hat = s (c - z)

Symmetric, ``Q = 2^(b-1)``: ``s = +-max(A, B) / Q`` and ``z = Q``, with plus where the negative side is the larger one
before it is cut, so that it keeps code 0. Rounding to codes and to the storage type has gradient one, the clamp ``m``,
and the zero-point none::

    dL/ds = sum_j g (c - z - m w / s)
    dL/dl = -min sigmoid'(l) dL/dA      dL/du = max sigmoid'(u) dL/dB
    dL/dA = dL/dB = dL/ds / n                              asymmetric
    dL/dA = +-dL/ds / Q where A > B, else dL/dB            symmetric

One bit (the one-bit groups of SliM-LLM+, arXiv 2405.14917), :class:`Spread`: two levels around the mean ``mu``, whose
distance from it is learnt, ``u`` = 0 at the start::

    a = mean|w - mu| (sigmoid(u) + 1/2)    w_hat = mu + a where w > mu, else mu - a
    dL/da = sum_j g sign(w_hat - mu)       dL/du = mean|w - mu| sigmoid'(u) dL/da

All is moved by AdamW without decay of the weights.

Deviations: the range always includes zero; scales and offsets go through their 16-bit storage type at every step; the
zero-point is added before rounding (the two differ at ties only). Symmetric grids are this project's, which use all
codes, and not the published ones; only the larger end of a range learns there. The published one-bit groups take
``mean|w|`` for the spread, start at ``u = 4``, 48% too wide, and lose the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, encode, stored_scale
from bitfloor.core.spec import QuantSpec
from bitfloor.ops import rounding
from bitfloor.ops.rounding_reference import chunks, groups_of, lane_sum
from bitfloor.solvers.adamw import AdamW
from bitfloor.solvers.ranges import group_bits, grouped, levels, mean_and_spread

START = 4.0  # logit of both factors: 98.2% of the range
BETAS = (0.9, 0.999)


class Clipping:
    """The learnable ranges of one matrix.

    Args:
        weight: ``[O, I]`` float32; kept, not changed (a dense copy, if its rows are not dense).
        spec: width (one for all groups, 2 bits or more), grouping, symmetry, storage type.

    Raises:
        ValueError: one bit, which has no range; see :class:`Spread`.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec) -> None:
        if spec.bits < 2:
            raise ValueError("clipping needs at least 2 bits")
        self.weight = weight.contiguous()
        self.spec = spec
        self.size = spec.columns_per_group(weight.shape[1])
        parts = grouped(weight, self.size)
        self._min = parts.amin(-1).clamp_max(0.0)
        self._max = parts.amax(-1).clamp_min(0.0)
        self.low = torch.full_like(self._min, START)
        self.high = torch.full_like(self._max, START)
        self.adam, self.steps = AdamW(betas=BETAS), 0

    def grid(self) -> Grid:
        """The grid of the present ranges."""
        dtype = getattr(torch, self.spec.scale_dtype)
        widths = group_bits(self.spec, self.low.shape[1]).to(self.weight.device)
        scale, zero = self._scale_and_zero()
        return Grid(scale, zero, None, widths, self.size, constant_zero=self.spec.symmetric, scale_dtype=dtype)

    def fake_quantized(self) -> Tensor:
        """``w_hat [O, I]`` float32 at the present parameters, outside of any graph."""
        return rounding.fake_quantize(self.weight, None, *self._scale_and_zero(), self.spec.bits, self.size)

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """One step of both logits.

        Args:
            grad: ``[O, I]`` gradient of the loss with respect to :meth:`fake_quantized`.
            rate: not used, codes follow from the ranges.
            range_rate: step of AdamW.
        """
        scale, zero = self._scale_and_zero()
        dense = grad.float().contiguous()
        towards, _ = rounding.sign_step(self.weight, None, scale, zero, dense, 0.0, self.spec.bits, self.size)
        low, high = torch.sigmoid(self.low), torch.sigmoid(self.high)
        if self.spec.symmetric:
            below, slope = -low * self._min > high * self._max, self._sign() * towards / (1 << (self.spec.bits - 1))
            to_low, to_high = slope * below, slope * ~below
        else:
            to_low = to_high = towards / ((1 << self.spec.bits) - 1)
        self.steps += 1
        self.adam.step("low", self.low, -self._min * low * (1.0 - low) * to_low, range_rate, self.steps)
        self.adam.step("high", self.high, self._max * high * (1.0 - high) * to_high, range_rate, self.steps)

    def snapshot(self) -> tuple[Tensor, Grid]:
        """Codes ``[O, I]`` uint8 and grid, all that is needed of the best step."""
        grid = self.grid()
        assert grid.zero is not None
        return rounding.codes(self.weight, None, grid.scale, grid.zero, self.spec.bits, self.size), grid

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Scale and zero-point ``[O, G]``, as stored."""
        dtype = getattr(torch, self.spec.scale_dtype)
        below, above = -torch.sigmoid(self.low) * self._min, torch.sigmoid(self.high) * self._max
        empty = self._min == self._max  # both are zero: the range always includes it
        if self.spec.symmetric:
            half = float(1 << (self.spec.bits - 1))
            signed = torch.where(empty, 1.0, self._sign() * torch.maximum(below, above))
            return stored_scale(signed / half, dtype), torch.full_like(below, half)
        top = float((1 << self.spec.bits) - 1)
        scale = stored_scale(torch.where(empty, 1.0, (above + below) / top), dtype)
        return scale, torch.round(below / scale).clamp_(0.0, top)

    def _sign(self) -> Tensor:
        """Of a symmetric grid's scale: negative where the positive side is on code 0."""
        return torch.where(-self._min > self._max, 1.0, -1.0)


class Spread:
    """The learnable spread of the two levels of a matrix of one bit. Codes and means stay as they are.

    Args:
        weight: ``[O, I]`` float32; not kept.
        spec: one bit; grouping, storage type.

    Raises:
        ValueError: more than one bit.
    """

    def __init__(self, weight: Tensor, spec: QuantSpec) -> None:
        if spec.bits != 1:
            raise ValueError("a spread is that of one bit")
        self.spec = spec
        self.size = spec.columns_per_group(weight.shape[1])
        valid = grouped(torch.ones(weight.shape[1], device=weight.device), self.size)
        found = [mean_and_spread(groups_of(weight[rows], self.size), valid) for rows in chunks(weight)]
        self._mean, self._spread = (torch.cat(part) for part in zip(*found, strict=True))
        self.factor = torch.zeros_like(self._spread)
        self.codes = encode(weight, self.grid())
        self.adam, self.steps = AdamW(betas=BETAS), 0

    def grid(self) -> Grid:
        """The grid of the present spread; at the start that of `bitfloor.solvers.ranges.minmax_grid`, bit for bit."""
        dtype = getattr(torch, self.spec.scale_dtype)
        widths = group_bits(self.spec, self.factor.shape[1]).to(self.factor.device)
        scale, offset = levels(self._mean, self._spread * (torch.sigmoid(self.factor) + 0.5), dtype)
        return Grid(scale, None, offset, widths, self.size, scale_dtype=dtype)

    def fake_quantized(self) -> Tensor:
        """``w_hat [O, I]`` float32 at the present parameters, outside of any graph."""
        grid, columns = self.grid(), self.codes.shape[1]
        out = torch.empty(self.codes.shape, device=self.codes.device)
        for rows in chunks(self.codes):
            code = groups_of(self.codes[rows].float(), self.size)
            out[rows] = code.mul_(grid.scale[rows, :, None]).add_(grid.shift[rows, :, None]).flatten(1)[:, :columns]
        return out

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """One step of the spread's logit; the arguments are those of :meth:`Clipping.step`."""
        towards = torch.empty_like(self._spread)
        for rows in chunks(self.codes):
            towards[rows] = lane_sum(groups_of(grad[rows].float() * (2.0 * self.codes[rows].float() - 1.0), self.size))
        factor = torch.sigmoid(self.factor)
        self.steps += 1
        self.adam.step("factor", self.factor, self._spread * factor * (1.0 - factor) * towards, range_rate, self.steps)

    def snapshot(self) -> tuple[Tensor, Grid]:
        """Codes ``[O, I]`` uint8, the same at every step, and grid."""
        return self.codes, self.grid()

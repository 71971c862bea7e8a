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

A move of the zero-point shifts code and zero-point alike, so it changes those weights only that are clamped (none is at
the start), and it is rounded, so its steps must sum to a half before anything changes:
``dL/dz = s sum_j g (m - 1)`` with ``m`` one where a code is not. Instead of by signs, everything may move by AdamW, on
the gradients ``dL/dV = s m g``, ``dL/dgamma = s0 dL/ds`` and the above.

After the factor on the scale of SignRoundV2 (arXiv 2512.04746), which starts from a searched scale and no codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, stored_scale
from bitfloor.core.packed import expand_groups
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
        grid: of the start, all groups of one width, with zero-points (not offsets).
        tune_scale: learn the factors; otherwise only ``V``.
        zero_share: step of the zero-points' moves, of the rounding's step; 0 keeps them. They stay in any case where
            they are not stored (a symmetric grid).
        adam: moves everything, with moments kept in it; None takes steps of the signs.

    Raises:
        ValueError: a grid with offsets or of several widths.
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
        if grid.zero is None or not bool((grid.bits == self.bits).all()):
            raise ValueError("refinement needs a grid with zero-points and of one width")
        self.start = grid
        self.zero = grid.zero
        self.zero_share = 0.0 if grid.constant_zero else zero_share
        self.adam, self.steps = adam, 0
        self.size = grid.group_size
        self.tune_scale = tune_scale
        self.weight = latent(weight, codes, grid)
        self.shift = torch.zeros_like(self.weight)
        self.factor = torch.ones_like(grid.scale)
        self.move = torch.zeros_like(grid.scale) if self.zero_share else None

    def grid(self) -> Grid:
        """The grid of the present factors; at the start the one given, bit for bit."""
        start = self.start
        return Grid(self._scale(), self.zero, None, start.bits, self.size, start.constant_zero, start.scale_dtype)

    def fake_quantized(self) -> Tensor:
        """``w_hat [O, I]`` float32 at the present parameters, outside of any graph."""
        return rounding.fake_quantize(self.weight, self.shift, self._scale(), self.zero, self.bits, self.size)

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """One step against the sign of the gradients.

        Args:
            grad: ``[O, I]`` gradient of the loss with respect to :meth:`fake_quantized`; any positive scale.
            rate: step of ``V``, in steps of the grid.
            range_rate: step of the factors.
        """
        scale, grad = self._scale(), grad.float().contiguous()
        inside = None if self.adam is None else self._inside(scale)
        # With AdamW only the sums are wanted, so the shift takes a step of nothing.
        by_sign = rate if self.adam is None else 0.0
        towards, clipped = rounding.sign_step(
            self.weight, self.shift, scale, self.zero, grad, by_sign, self.bits, self.size
        )
        self.steps += 1
        if inside is not None:
            wide = expand_groups(scale, self.size, grad.shape[1])
            self._moved("shift", self.shift, grad * wide * inside, rate)
        if self.tune_scale:
            self._moved("factor", self.factor, towards * self.start.scale, range_rate).clamp_(0.0, WIDEST)
        if self.move is not None:
            self._moved("move", self.move, clipped * scale, self.zero_share * rate)
            top = float((1 << self.bits) - 1)
            self.zero = torch.round(self._first_zero() + self.move).clamp_(0.0, top)

    def _moved(self, name: str, parameter: Tensor, grad: Tensor, rate: float) -> Tensor:
        """One parameter, one step further, in place."""
        if self.adam is None:
            return parameter.sub_(rate * torch.sign(grad))
        self.adam.step(name, parameter, grad, rate, self.steps)
        return parameter

    def _inside(self, scale: Tensor) -> Tensor:
        """``[O, I]`` bool: which codes are not clamped."""
        wide, zero = (expand_groups(part, self.size, self.weight.shape[1]) for part in (scale, self.zero))
        code = torch.round((self.weight + zero * wide) / wide + self.shift)
        return (code >= 0.0) & (code <= float((1 << self.bits) - 1))

    def _first_zero(self) -> Tensor:
        assert self.start.zero is not None
        return self.start.zero

    def snapshot(self) -> tuple[Tensor, Grid]:
        """Codes ``[O, I]`` uint8 and grid, all that is needed of the best step."""
        grid = self.grid()
        return rounding.codes(self.weight, self.shift, grid.scale, self.zero, self.bits, self.size), grid

    def _scale(self) -> Tensor:
        """``[O, G]`` as stored."""
        return stored_scale(self.start.scale * self.factor, self.start.scale_dtype)


def latent(weight: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """``[O, I]`` float32: as near to ``weight`` as rounding to ``codes`` on ``grid`` allows.

    Args:
        weight: ``[O, I]`` float32.
        codes: ``[O, I]`` uint8.
        grid: with zero-points.
    """
    assert grid.zero is not None
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    exact = grouped(weight, grid.group_size) / scale + zero
    middle = grouped(codes.float(), grid.group_size)
    inside = torch.maximum(torch.minimum(exact, middle + MARGIN), middle - MARGIN)
    return ((inside - zero) * scale).flatten(1)[:, : weight.shape[1]].contiguous()

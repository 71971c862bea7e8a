"""Learned rounding that starts from a solution: codes and grid of GPTQ, or of any other method.

| symbol | here | meaning |
| --- | --- | --- |
| ``q0, s0, z`` | codes, grid | where it starts; the zero-point stays |
| ``u`` | ``weight`` ``[O, I]`` | latent weight: rounds to ``q0``, and lies as near to ``w`` as that allows |
| ``V`` | ``shift`` ``[O, I]`` | learned, starts at 0 |
| ``gamma`` | ``factor`` ``[O, G]`` | learned factor on the scale, starts at 1, between 0 and 2 |

    s = gamma s0        w_hat = (clamp(round(u / s + z + V), 0, 2^b - 1) - z) s
    u / s0 + z = clamp(w / s0 + z, q0 - m, q0 + m)        m = 0.49

Sign steps as in :mod:`bitfloor.solvers.signround`, with the scale's factor in the place of the range's two. The latent
weight carries what the start knows: a code that was moved away from the nearest one for the sake of others lies at the
border and goes back after one step, one that was nearest lies where ``w`` lies. A latent weight in the middle of its
code would forget that; all codes then flip at the same step, and learning diverges.

After the factor on the scale of SignRoundV2 (arXiv 2512.04746), which starts from a searched scale and no codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, stored_scale
from bitfloor.ops import rounding
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

    Raises:
        ValueError: a grid with offsets or of several widths.
    """

    def __init__(self, weight: Tensor, codes: Tensor, grid: Grid, *, tune_scale: bool = True) -> None:
        self.bits = int(grid.bits[0])
        if grid.zero is None or not bool((grid.bits == self.bits).all()):
            raise ValueError("refinement needs a grid with zero-points and of one width")
        self.start = grid
        self.zero = grid.zero
        self.size = grid.group_size
        self.tune_scale = tune_scale
        self.weight = latent(weight, codes, grid)
        self.shift = torch.zeros_like(self.weight)
        self.factor = torch.ones_like(grid.scale)

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
        scale = self._scale()
        towards, _ = rounding.sign_step(
            self.weight, self.shift, scale, self.zero, grad.float().contiguous(), rate, self.bits, self.size
        )
        if self.tune_scale:
            # The zero-point does not move: what is clamped follows the scale alone, and that is in the sum already.
            slope = torch.sign(towards) * torch.sign(self.start.scale)
            self.factor.sub_(range_rate * slope).clamp_(0.0, WIDEST)

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

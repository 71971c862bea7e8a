"""Ranges as the code of SliM-LLM finds them (its "salience-weighted quantizer calibration", SQC; arXiv 2405.14917).

| symbol | meaning |
| --- | --- |
| ``lo, hi`` | of one row of a group, including zero |
| ``tau`` | factor on the range: 1, then 1.002 to 1.100, then 0.998 to 0.900 in steps of 0.002 |

    s_tau = tau (hi - lo) / (2^b - 1)     z = round(-lo / s_1)     tau* = argmin_tau sum_j |w_hat_j(tau) - w_j|^2.4

of equals the first. In paper and code the sum has two parts, over salient weights and over the others, whose weights
are both one: the division changes nothing, and there is no salience in it. Ten percent is little: at 2 bits nearly
every row ends at 0.9, while the best factor is about 0.6. This is here to compare with; ``range: search`` is the one
that works (separate ends, weights by the Hessian, least-squares refit).

One-bit groups are not searched: ``mean +- mean|w - mean|``. The published code takes ``mean|w|``, which is not the best
spread, and loses the mean when it packs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, stored_scale
from bitfloor.core.packed import expand_groups
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.ranges import grouped, minmax_grid

EXPONENT = 2.4
SLICES, STEP = 50, 0.002
FACTORS = (1.0, *(1.0 + STEP * k for k in range(1, SLICES + 1)), *(1.0 - STEP * k for k in range(1, SLICES + 1)))


def sqc_grid(weight: Tensor, spec: QuantSpec, bits: Tensor | None = None) -> Grid:
    """The published grid of every group.

    Args:
        weight: ``[O, I]`` float32.
        spec: width, grouping, storage type; asymmetric.
        bits: ``[G]`` widths overriding those of the spec.

    Raises:
        ValueError: a symmetric spec.
    """
    if spec.symmetric:
        raise ValueError("the published search is for asymmetric grids")
    start = minmax_grid(weight, spec, bits)
    if start.zero is None:
        return start
    columns, size = weight.shape[1], start.group_size
    zero = expand_groups(start.zero, size, columns)
    top = expand_groups(start.max_code, size, columns)
    scale, best = start.scale.clone(), torch.full_like(start.scale, torch.inf)
    for factor in FACTORS:
        trial = stored_scale(start.scale * factor, start.scale_dtype)
        wide = expand_groups(trial, size, columns)
        codes = torch.round(weight / wide).add_(zero).clamp_min_(0.0).minimum(top)
        error = grouped((codes.sub_(zero).mul_(wide) - weight).abs_().pow_(EXPONENT), size).sum(-1)
        better = (error < best) & (start.bits != 1)
        scale, best = torch.where(better, trial, scale), torch.where(better, error, best)
    return Grid(scale, start.zero, start.offset, start.bits, size, False, start.scale_dtype)

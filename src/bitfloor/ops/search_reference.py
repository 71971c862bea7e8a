"""The inner loops of the grid search in plain torch: what the native kernels equal.

Float32, one operation at a time and in this order; sums in 16 lanes, as in :mod:`bitfloor.ops.rounding_reference`::

    c = clamp(round(w / s + f) + floor(z), 0, top) - z        f = z - floor(z)
    error = sum_j (w - c s)^2 h_j         above = sum_j (h_j w) c         below = sum_j h_j c^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.ops.rounding_reference import chunks, groups_of, lane_sum


def best_grid(
    weight: Tensor,
    importance: Tensor,
    tops: Tensor,
    candidates: tuple[Tensor, Tensor],
    best: tuple[Tensor, Tensor, Tensor],
    group_size: int,
) -> None:
    """See :func:`bitfloor.ops.search.best_grid`."""
    weights = groups_of(importance, group_size)
    scale, zero, error = best
    for rows in chunks(weight):
        groups = groups_of(weight[rows], group_size)
        for s, z in zip(candidates[0][:, rows], candidates[1][:, rows], strict=True):
            code = _centred(groups, tops, s, z)
            found = lane_sum((groups - code * s[..., None]).square_().mul_(weights))
            better = found < error[rows]
            error[rows] = torch.where(better, found, error[rows])
            scale[rows] = torch.where(better, s, scale[rows])
            zero[rows] = torch.where(better, z, zero[rows])


def fit_sums(
    weight: Tensor, importance: Tensor, tops: Tensor, scale: Tensor, zero: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """See :func:`bitfloor.ops.search.fit_sums`."""
    weights = groups_of(importance, group_size)
    above, below = torch.empty_like(scale), torch.empty_like(scale)
    for rows in chunks(weight):
        groups = groups_of(weight[rows], group_size)
        code = _centred(groups, tops, scale[rows], zero[rows])
        above[rows] = lane_sum((weights * groups).mul_(code))
        below[rows] = lane_sum(code.square_().mul_(weights))
    return above, below


def _centred(groups: Tensor, tops: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes less their zero-point ``[rows, G, g]``."""
    zero = zero[..., None]
    whole = torch.floor(zero)
    code = (groups / scale[..., None]).add_(zero - whole).round_().add_(whole).clamp_min_(0.0)
    return code.minimum(tops[:, None]).sub_(zero)

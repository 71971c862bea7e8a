"""Coordinate descent on codes and scales, in the space of the layer's output error.

| symbol | meaning |
| --- | --- |
| ``W [O, I]`` | the target |
| ``W_hat`` | the quantized weights, ``(q - z) s`` |
| ``H [I, I]`` | ``X^T X`` of the layer's inputs, damped |
| ``D`` | ``W_hat - W``; the error is ``tr(D H D^T)`` |

One column at a time, all rows at once: with everything else fixed, the error is a parabola in ``w_hat_j`` with its
lowest point at ``w_hat_j - (D H)_j / H_jj``, so the nearest point of the grid is the exact minimum. After the columns
of a group its scale follows, which is a parabola too, with ``c = q - z``:

    s <- s - <D H, c>_g / (c H_gg c^T)

kept where it lowers the error after it went through its storage type. No step raises the damped error, beyond the
rounding of float32.

GPTQ fixes a column once, when the columns behind it are still free; this looks at each again when they are not.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, stored_scale
from bitfloor.ops.sweeps import descend_columns


def descend(
    target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, *, damping: float, sweeps: int
) -> tuple[Tensor, Grid]:
    """Improve codes and scales.

    Args:
        target: ``[O, I]`` float32.
        codes: ``[O, I]`` uint8, the start; not changed.
        grid: of the start; not changed. The scales of groups with offsets stay as they are.
        hessian: ``[I, I]`` float32 in any scale; not changed. The codes of columns
            whose diagonal is zero stay as they are.
        damping: added to the diagonal, relative to its mean over the columns that are not zero.
        sweeps: how often every column is looked at.

    Returns:
        codes ``[O, I]`` uint8 and their grid.
    """
    columns, size = target.shape[1], grid.group_size
    diagonal = hessian.diagonal()
    live = diagonal > 0
    if not sweeps or not bool(live.any()):
        return codes, grid
    extra = damping * float(diagonal[live].mean())
    # One row per column, so that the loops read and write contiguous memory.
    error = (decode(codes, grid) - target).T.contiguous()  # D^T
    found = codes.T.float().contiguous()
    scale = grid.scale.T.clone(memory_format=torch.contiguous_format)
    zero = None if grid.zero is None else grid.zero.T
    tops = grid.max_code.tolist()
    for _ in range(sweeps):
        for group in range(scale.shape[0]):
            first, last = group * size, min(group * size + size, columns)
            local = hessian[first:last, first:last].clone()
            local.diagonal().add_(extra)
            # (D H)^T of these columns; the damping is diagonal, so it concerns them alone.
            slope = (hessian[first:last] @ error).add_(error[first:last], alpha=extra)
            part = error[first:last]
            own, top = scale[group], tops[group]
            pivots = torch.where(live[first:last], local.diagonal(), torch.inf)
            descend_columns(found[first:last], slope, part, local, pivots, own, top)
            if zero is not None and (grid.offset is None or tops[group] > 1.0):
                centred = found[first:last] - zero[group]
                own = _refitted(own, centred, slope, local, grid.scale_dtype)
                part += centred * (own - scale[group])
                scale[group] = own
    return found.T.to(torch.uint8).contiguous(), replace(grid, scale=scale.T.contiguous())


def _refitted(scale: Tensor, centred: Tensor, slope: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales ``[O]`` of one group that minimise the error for its codes; the old ones where that gains nothing.

    Args:
        scale: ``[O]``.
        centred: ``[g, O]`` codes less zero-points.
        slope: ``[g, O]`` ``D H`` of the group.
        local: ``[g, g]`` the group's part of the Hessian.
        dtype: storage type.
    """
    along = (centred * slope).sum(0)
    curved = (centred * (local @ centred)).sum(0)
    wanted = torch.where(curved > 0, scale - along / curved.clamp_min(1e-30), scale)
    # A scale does not change its sign: the zero-point would be on the wrong side.
    wanted = torch.where(wanted * scale > 0, stored_scale(wanted, dtype), scale)
    step = wanted - scale
    return torch.where(2.0 * step * along + step.square() * curved < 0, wanted, scale)

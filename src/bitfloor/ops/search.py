"""The inner loops of the grid search: rounding errors of many candidate grids, and the sums behind the best scale.

What is computed is defined in :mod:`bitfloor.ops.search_reference`, in torch. Dense float32 matrices on the CPU go to
the native kernels (``csrc/sweeps.cpp``) if they were built; they give the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.ops import search_reference as reference
from bitfloor.ops.native import library_for


@torch.no_grad()
def best_grid(
    weight: Tensor,
    importance: Tensor,
    tops: Tensor,
    candidates: tuple[Tensor, Tensor],
    best: tuple[Tensor, Tensor, Tensor],
    group_size: int,
) -> None:
    """Take each candidate grid, in order, that rounds a group with a smaller error than the best so far; in place.

    Args:
        weight: ``[O, I]`` float32.
        importance: ``[I]`` float32, weight of each column's squared error.
        tops: ``[G]`` float32, largest code of each group.
        candidates: scales and zero-points ``[C, O, G]`` float32; scales not zero.
        best: scale, zero-point and error ``[O, G]`` float32 of the best so far; an error of infinity for none.
        group_size: columns per group; the last may be short.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shape = _check(weight, importance, tops, group_size)
    for name, part in zip(("scales", "zeros", "scale", "zero", "error"), (*candidates, *best), strict=True):
        wanted = (candidates[0].shape[0], *shape) if part.dim() == 3 else shape
        if tuple(part.shape) != wanted or part.dtype != torch.float32 or part.dim() != (3 if name.endswith("s") else 2):
            raise ValueError(f"{name} is {part.dtype} {tuple(part.shape)}; float32 {wanted} is needed")
    made = library_for(weight, importance, tops, *candidates, *best) or reference
    made.best_grid(weight, importance, tops, candidates, best, group_size)


@torch.no_grad()
def fit_sums(
    weight: Tensor, importance: Tensor, tops: Tensor, scale: Tensor, zero: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """The two sums whose ratio is the least-squares scale for the codes of a grid.

    Args:
        weight, importance, tops, group_size: as in :func:`best_grid`.
        scale, zero: ``[O, G]`` float32.

    Returns:
        ``sum h w c`` and ``sum h c^2`` ``[O, G]`` float32, with ``c`` the codes less their zero-point.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shape = _check(weight, importance, tops, group_size)
    for name, part in (("scale", scale), ("zero", zero)):
        if tuple(part.shape) != shape or part.dtype != torch.float32:
            raise ValueError(f"{name} is {part.dtype} {tuple(part.shape)}; float32 {shape} is needed")
    made = library_for(weight, importance, tops, scale, zero) or reference
    return made.fit_sums(weight, importance, tops, scale, zero, group_size)


def _check(weight: Tensor, importance: Tensor, tops: Tensor, group_size: int) -> tuple[int, int]:
    if weight.dim() != 2 or group_size < 1:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} in groups of {group_size}; [O, I] and 1 are needed")
    rows, columns = weight.shape
    shape = (rows, -(-columns // group_size))
    for name, part, wanted in (("importance", importance, (columns,)), ("tops", tops, shape[1:])):
        if tuple(part.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(part.shape)}; {wanted} is needed")
    for name, part in (("weight", weight), ("importance", importance), ("tops", tops)):
        if part.dtype != torch.float32:
            raise ValueError(f"{name} is {part.dtype}; torch.float32 is needed")
    return shape

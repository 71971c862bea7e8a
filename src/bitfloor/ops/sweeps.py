"""The column loops of GPTQ and of coordinate descent.

What is computed is defined in :mod:`bitfloor.ops.sweeps_reference`, in torch, for any device and strides. Dense
float32 matrices on the CPU go to the native kernels (``csrc/sweeps.cpp``) if they were built, which give the same
values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.ops import sweeps_reference as reference
from bitfloor.ops.native import library_for


@torch.no_grad()
def gptq_columns(work: Tensor, local: Tensor, scale: Tensor, shift: Tensor, tops: Tensor) -> tuple[Tensor, Tensor]:
    """Round columns one after the other, each error spread over the columns behind it.

    Args:
        work: ``[n, O]`` float32, the weights column by column; changed in place.
        local: ``[n, n]`` float32, the columns' part of the upper triangular factor.
        scale, shift: ``[n, O]`` float32, grid of each weight.
        tops: ``[n]`` float32, largest code of each column.

    Returns:
        codes ``[n, O]`` uint8 and scaled errors ``[n, O]`` float32.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    columns, rows = _matrix("work", work)
    _check(work, local=(local, (columns, columns)), scale=(scale, (columns, rows)), tops=(tops, (columns,)))
    _check(work, shift=(shift, (columns, rows)))
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    library = library_for(work, local, scale, shift, tops, codes, errors)
    made = reference if library is None else library
    made.gptq_columns(work, local, scale, shift, tops, codes, errors)
    return codes, errors


@torch.no_grad()
def descend_columns(
    codes: Tensor, slope: Tensor, error: Tensor, local: Tensor, pivots: Tensor, scale: Tensor, top: float
) -> None:
    """Move each column of a group to the code that minimises the output error, all else fixed; in place.

    Args:
        codes: ``[n, O]`` float32 holding whole numbers, column by column.
        slope: ``[n, O]`` float32, ``H`` times the error, of these columns.
        error: ``[n, O]`` float32, quantized weights less their target.
        local: ``[n, n]`` float32, the columns' part of the Hessian.
        pivots: ``[n]`` float32, its diagonal; infinite for a column that stays as it is.
        scale: ``[O]`` float32, the group's scales.
        top: largest code.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    columns, rows = _matrix("codes", codes)
    _check(codes, slope=(slope, (columns, rows)), error=(error, (columns, rows)), local=(local, (columns, columns)))
    _check(codes, pivots=(pivots, (columns,)), scale=(scale, (rows,)))
    library = library_for(codes, slope, error, local, pivots, scale)
    made = reference if library is None else library
    made.descend_columns(codes, slope, error, local, pivots, scale, top)


def _matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2 or tensor.dtype != torch.float32:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; float32 [columns, rows] is needed")
    return tensor.shape[0], tensor.shape[1]


def _check(like: Tensor, **wanted: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (part, shape) in wanted.items():
        if tuple(part.shape) != shape or part.dtype != torch.float32 or part.device != like.device:
            raise ValueError(
                f"{name} is {part.dtype} {tuple(part.shape)} on {part.device}; "
                f"float32 {shape} on {like.device} is needed"
            )

"""GPTQ: round column by column, spread each column's error over the columns still to come (arXiv 2210.17323).

| symbol | meaning |
| --- | --- |
| ``W [O, I]`` | the weights, updated as columns are fixed |
| ``H [I, I]`` | ``X^T X`` of the layer's inputs |
| ``U`` | upper Cholesky factor of ``(H + damping)^-1``: ``H^-1 = U^T U`` |
| ``e_j`` | ``(w_j - w_hat_j) / U_jj``, the scaled error of column ``j`` |

    w_k <- w_k - e_j U_jk          for all k after j              (GPTQ, equation 2 with algorithm 1's factor)

Deviations: the order of columns may follow the diagonal of ``H`` (largest first) while the groups stay those of the
natural order with grids fixed beforehand ("static groups"), so the file needs no column order; the factor is obtained
in float64; damping is raised tenfold, and reported, when the factorisation fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.affine import Grid
from bitfloor.core.errors import BitfloorError
from bitfloor.core.linalg import inverse_factor

BLOCK = 128


@dataclass(frozen=True)
class GptqResult:
    """Codes of one matrix (or several stacked over the same input).

    Args:
        codes: ``[O, I]`` uint8, natural column order.
        damping: the relative damping that was used in the end.
    """

    codes: Tensor
    damping: float


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, damping: float = 0.01, act_order: bool = True) -> GptqResult:
    """Codes of ``weight`` on ``grid`` that keep ``W X`` rather than ``W``.

    Args:
        weight: ``[O, I]`` float32; not changed.
        hessian: ``[I, I]`` ``X^T X`` in any scale, float32 or float64; not changed. Channels whose diagonal is zero
            never see an input: they are rounded to nearest and take part in nothing.
        grid: the grid of the matrix; widths may differ from group to group.
        damping: added to the diagonal, relative to its mean. Raised tenfold until the factorisation succeeds.
        act_order: treat columns in order of falling diagonal.

    Raises:
        BitfloorError: the Hessian is not finite, or cannot be factorised at any damping.
    """
    columns = weight.shape[1]
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(torch.stack(hessian.aminmax())).all()):  # the extremes carry a NaN from anywhere
        raise BitfloorError("the Hessian holds NaN or Inf: the calibration activations overflowed; check the model.")
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(columns, device=weight.device)
    )
    factor, used = inverse_factor(hessian[order][:, order], damping)
    scale, shift, top = (part[..., order] for part in grid.columns(columns))
    codes = _sweep(weight.float()[:, order].contiguous(), factor.float(), scale, shift, top)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return GptqResult(out, used)


def _sweep(work: Tensor, factor: Tensor, scale: Tensor, shift: Tensor, top: Tensor) -> Tensor:
    """The column loop on permuted operands; ``work`` is consumed. Errors leave a block in one matrix product."""
    columns = work.shape[1]
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    # Column-major copies: the loop then reads and writes contiguous rows.
    shift, scale = shift.T.contiguous(), scale.T.contiguous()
    limits = top.tolist()
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block = work[:, begin:end].T.contiguous()  # [block, O]
        local = factor[begin:end, begin:end]
        pivots = local.diagonal().tolist()
        errors = torch.empty_like(block)
        for j in range(end - begin):
            at = begin + j
            column = block[j]
            code = torch.sub(column, shift[at]).div_(scale[at]).round_().clamp_(0.0, limits[at])
            codes[:, at] = code.to(torch.uint8)
            error = errors[j]
            torch.sub(column, code.mul_(scale[at]).add_(shift[at]), out=error).div_(pivots[j])
            if j + 1 < end - begin:
                block[j + 1 :].addr_(local[j, j + 1 :], error, alpha=-1.0)
        if end < columns:
            work[:, end:].addmm_(errors.T, factor[begin:end, end:], alpha=-1.0)
    return codes

"""The column loops of GPTQ and of coordinate descent in plain torch: what the native kernels equal.

Everything is laid out column by column, ``[n, O]`` for ``n`` columns, and computed in float32, one operation at a time
and in this order; rows do not depend on each other. Equal but for the sign of a zero.

GPTQ, with ``U [n, n]`` the columns' part of the factor, for each column ``j`` in turn::

    q_j = clamp(round((w_j - o_j) / s_j), 0, top_j)      e_j = (w_j - (q_j s_j + o_j)) / U_jj
    w_k <- w_k + (-U_jk) e_j                             for k > j

Coordinate descent, with ``H [n, n]`` the columns' part of the Hessian and ``p_j`` its diagonal, for each column ``j``::

    q <- clamp(round(q_j - (g_j / p_j) / s), 0, top)     d = (q - q_j) s
    g_k <- g_k + H_jk d    for all k                     D_j <- D_j + d        q_j <- q
"""

from __future__ import annotations

from torch import Tensor


def gptq_columns(
    work: Tensor, local: Tensor, scale: Tensor, shift: Tensor, tops: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """Fix columns one after the other; see :func:`bitfloor.ops.sweeps.gptq_columns`."""
    for j, top in enumerate(tops.tolist()):
        code = (work[j] - shift[j]).div_(scale[j]).round_().clamp_(0.0, top)
        codes[j] = code
        errors[j] = (work[j] - code.mul_(scale[j]).add_(shift[j])).div_(local[j, j])
        work[j + 1 :] += -local[j, j + 1 :, None] * errors[j]


def descend_columns(
    codes: Tensor, slope: Tensor, error: Tensor, local: Tensor, pivots: Tensor, scale: Tensor, top: float
) -> None:
    """Look at columns one after the other; see :func:`bitfloor.ops.sweeps.descend_columns`."""
    for j in range(len(codes)):
        best = (codes[j] - (slope[j] / pivots[j]).div_(scale)).round_().clamp_(0.0, top)
        moved = (best - codes[j]).mul_(scale)
        codes[j] = best
        error[j] += moved
        slope += local[j, :, None] * moved

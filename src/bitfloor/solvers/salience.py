"""How much a weight matters to the output of its layer, from the inverse of its inputs' Hessian.

| symbol | meaning |
| --- | --- |
| ``H [I, I]`` | ``X^T X`` of the layer's inputs, damped relative to its mean diagonal |
| ``U`` | upper Cholesky factor of its inverse: ``H^-1 = U^T U`` |
| ``s_ij`` | salience of weight ``w_ij``: the error of removing it, the others making up for it |

    s_ij = w_ij^2 / U_jj^2                 as in the code of SliM-LLM (arXiv 2405.14917): given GPTQ's order of columns
    s_ij = w_ij^2 / [H^-1]_jj              the same with all other columns free, whatever their order

In the first form ``U_jj^2`` is ``[(H_jj..II)^-1]_jj``: only the columns behind make up for it, so the last columns of a
correlated input look more salient for where they stand. The paper's definition squares the diagonal of the inverse
itself, its algorithm and code that of the factor; the code's form is the error it is said to be.

Deviation: one relative damping. The code ranks first with an absolute 0.01, then again with more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.linalg import inverse_factor
from bitfloor.solvers.ranges import grouped


def removal_costs(hessian: Tensor, *, damping: float = 0.01, positional: bool = True) -> Tensor:
    """What removing a weight of one costs, by column: ``1 / U_jj^2``, or ``1 / [H^-1]_jj``.

    Args:
        hessian: ``[I, I]``, any scale; channels that never saw an input cost nothing.
        damping: relative to the mean of the diagonal; raised tenfold until the factorisation succeeds.
        positional: the published form, in which only columns behind a column make up for it.

    Returns:
        ``[I]`` float32.

    Raises:
        BitfloorError: the Hessian cannot be factorised at any damping.
    """
    factor, _ = inverse_factor(hessian, damping)
    inverse = factor.diagonal().square() if positional else factor.square().sum(0)
    return torch.where(hessian.diagonal() > 0, (1.0 / inverse).float(), 0.0)


def group_salience(weight: Tensor, costs: Tensor, group_size: int) -> Tensor:
    """Summed salience of every group of columns, ``[G]`` float64.

    Args:
        weight: ``[O, I]`` float32.
        costs: ``[I]`` of :func:`removal_costs`.
        group_size: columns of a group; the last may be short.
    """
    by_column = weight.square().sum(0, dtype=torch.float64) * costs.double()
    return grouped(by_column, group_size).sum(-1)

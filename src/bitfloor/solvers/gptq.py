"""GPTQ: round column by column, spread each column's error over the columns still to come (arXiv 2210.17323).

| symbol | meaning |
| --- | --- |
| ``W [O, I]`` | the weights, updated as columns are fixed |
| ``H [I, I]`` | ``X^T X`` of the layer's inputs |
| ``U`` | upper Cholesky factor of ``(H + damping)^-1``: ``H^-1 = U^T U`` |
| ``e_j`` | ``(w_j - w_hat_j) / U_jj``, the scaled error of column ``j`` |

    w_k <- w_k - e_j U_jk          for all k after j              (GPTQ, equation 2 with algorithm 1's factor)

The grid of a group is either given beforehand ("static groups") or found when the sweep reaches the group, from the
weights as the errors of the columns before have moved them: the paper's way, and the better one at few bits, where
they move far.

The inputs ``X'`` of a layer are those of the quantized model; in the float model they were ``X``. To keep ``W X``
rather than ``W X'``, the sweep starts from the least-squares solution for a share ``a`` of the difference (GPTAQ, arXiv
2504.02692, and Qronos, arXiv 2505.11695, pursue the same target by other means; the closed form is that of QEP, arXiv
2504.09629):

    W <- W + a W (X - X')^T X' (H + damping)^-1

Deviations: in order of falling diagonal of ``H``, groups stay those of the natural order, so the file needs no column
order (with static groups the columns are taken one by one, otherwise group by group and by columns inside a group);
the factor is obtained in float64; damping is raised tenfold, and reported, when the factorisation fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, join_groups
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.linalg import all_finite, inverse_factor
from bitfloor.ops.sweeps import gptq_columns

BLOCK = 128
NOT_FINITE = "the Hessian holds NaN or Inf: the calibration activations overflowed; check the model."


@dataclass(frozen=True)
class GridSearch:
    """How to find the grid of a group.

    Args:
        group_size: columns per group; the last group may be short.
        find: called as ``find(group, weights [O, g], columns [g])`` with the index of the group, its weights as
            they are by then, in natural order, and their column numbers; returns a grid of one group.
        static: find all grids before the sweep, from the target; otherwise each when the sweep reaches its group.
    """

    group_size: int
    find: Callable[[int, Tensor, Tensor], Grid]
    static: bool = False


@dataclass(frozen=True)
class GptqResult:
    """Codes of one matrix (or several stacked over the same input).

    Args:
        codes: ``[O, I]`` uint8, natural column order.
        grid: the grid of the codes: the one given, or the one found.
        damping: the relative damping that was used in the end.
        target: ``[O, I]`` float32, what the codes approximate: the weight, or the weight corrected for drift.
        errors: ``[G]`` float64, the share of every group in the damped output error: ``e_j^2`` summed over its columns
            and over rows, each row counted as asked for; None if it was not.
    """

    codes: Tensor
    grid: Grid
    damping: float
    target: Tensor
    errors: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Factor:
    """What a sweep takes from the Hessian, for several matrices of one input.

    Args:
        order: column numbers in the order of the sweep.
        factor: ``[I, I]`` float32, ``U`` in that order.
        damping: the relative damping that was used.
    """

    order: Tensor
    factor: Tensor
    damping: float


def factorise(hessian: Tensor, group_size: int, *, damping: float, act_order: bool, whole_groups: bool) -> Factor:
    """Order and factor of a sweep.

    Args:
        hessian: as for :func:`gptq`.
        group_size: columns of a group.
        damping: as for :func:`gptq`.
        act_order: as for :func:`gptq`.
        whole_groups: columns of a group stay together: grids are found on the way.

    Raises:
        BitfloorError: the Hessian is not finite, or cannot be factorised at any damping.
    """
    if not all_finite(hessian):
        raise BitfloorError(NOT_FINITE)
    groups = torch.arange(hessian.shape[0], device=hessian.device) // group_size
    order = _order(hessian.diagonal(), groups, act_order, whole_groups=whole_groups)
    permuted = hessian[order][:, order]
    trim_heap()
    factor, used = inverse_factor(permuted, damping)
    del permuted
    return Factor(order, factor.float(), used)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid | GridSearch,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    drift: Tensor | None = None,
    correction: float = 0.0,
    factor: Factor | None = None,
    counted: Tensor | None = None,
) -> GptqResult:
    """Codes of ``weight`` that keep ``W X`` rather than ``W``.

    Args:
        weight: ``[O, I]`` float32; not changed.
        hessian: ``[I, I]`` ``X^T X`` in any scale, float32 or float64; not changed. Channels whose diagonal is zero
            never see an input: they are rounded to nearest and take part in nothing.
        grid: the grid of the matrix, or how to find it; widths may differ from group to group.
        damping: added to the diagonal, relative to its mean. Raised tenfold until the factorisation succeeds.
        act_order: treat columns in order of falling diagonal; groups, and columns inside them, where grids are found
            on the way.
        drift: ``[I, I]`` ``(X - X')^T X'`` in the scale of the Hessian, with ``X`` the inputs in the float model and
            ``X'`` those that the Hessian was made of.
        correction: share ``a`` of the drift that the target makes up for.
        factor: of the Hessian, for these groups, this damping and this order, where it is known already.
        counted: ``[O]``, how much a row counts in ``errors``; None reports none.

    Raises:
        BitfloorError: the Hessian or the drift is not finite, or the Hessian cannot be factorised at any damping.
    """
    if drift is not None and not all_finite(drift):
        raise BitfloorError(NOT_FINITE)
    columns = weight.shape[1]
    groups = torch.arange(columns, device=weight.device) // grid.group_size
    on_the_way = isinstance(grid, GridSearch) and not grid.static
    if factor is None:
        size = grid.group_size
        factor = factorise(hessian, size, damping=damping, act_order=act_order, whole_groups=on_the_way)
        trim_heap()
    order, upper = factor.order, factor.factor
    target = weight.float()
    if drift is not None and correction:
        moved = (correction * (target @ drift)[:, order]) @ upper.T @ upper
        target = target.clone()
        target[:, order] += moved
        del moved
    if isinstance(grid, GridSearch) and grid.static:
        numbers = range(int(groups[-1]) + 1)
        at = [torch.nonzero(groups == number).flatten() for number in numbers]
        parts = [grid.find(number, target[:, at[number]], at[number]) for number in numbers]
        grid = join_groups(parts, grid.group_size)
    sweep = _Sweep(target[:, order], upper, counted)
    if isinstance(grid, Grid):
        sweep.through(0, columns, grid, groups[order])
    else:
        grid = _find_and_sweep(sweep, grid, order, groups[order])
    codes = torch.empty_like(sweep.codes)
    codes[:, order] = sweep.codes
    errors = None
    if sweep.errors is not None:
        errors = sweep.errors.new_zeros(int(groups[-1]) + 1).index_add_(0, groups[order], sweep.errors)
    return GptqResult(codes, grid, factor.damping, target, errors)


def _order(diagonal: Tensor, groups: Tensor, act_order: bool, *, whole_groups: bool) -> Tensor:
    """Column numbers in the order of the sweep."""
    if not act_order:
        return torch.arange(len(diagonal), device=diagonal.device)
    order = torch.argsort(diagonal, descending=True, stable=True)
    if not whole_groups:
        return order
    total = torch.zeros(int(groups[-1]) + 1, dtype=torch.float64, device=diagonal.device)
    total.index_add_(0, groups, diagonal.double())
    rank = torch.empty_like(total, dtype=torch.int64)
    rank[torch.argsort(total, descending=True, stable=True)] = torch.arange(len(total), device=diagonal.device)
    return order[torch.argsort(rank[groups[order]], stable=True)]


def _find_and_sweep(sweep: _Sweep, search: GridSearch, order: Tensor, groups: Tensor) -> Grid:
    """Group by group: find the grid, sweep the group's columns."""
    found: dict[int, Grid] = {}
    numbers, counts = torch.unique_consecutive(groups, return_counts=True)
    begin = 0
    for group, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        at = order[begin : begin + count]
        natural = torch.argsort(at)
        found[group] = search.find(group, sweep.work[:, begin : begin + count][:, natural], at[natural])
        sweep.through(begin, begin + count, found[group], torch.zeros_like(at))
        begin += count
    return join_groups([found[group] for group in sorted(found)], search.group_size)


class _Sweep:
    """The column loop on permuted operands. Errors leave a block in one matrix product.

    Args:
        work: ``[O, I]`` weights in the order of the sweep; consumed. Columns not yet swept are up to date after each
            call of :meth:`through`.
        factor: ``[I, I]`` float32, ``U`` in the same order.
        counted: ``[O]``, how much a row counts in ``errors``; None sums none.

    Attributes:
        errors: ``[I]`` float64, squared errors of the columns that were swept, or None.
    """

    def __init__(self, work: Tensor, factor: Tensor, counted: Tensor | None = None) -> None:
        self.counted = counted
        self.errors = None if counted is None else torch.zeros(work.shape[1], dtype=torch.float64, device=work.device)
        self.work = work.contiguous()
        self.factor = factor
        self.codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)

    def through(self, begin: int, end: int, grid: Grid, groups: Tensor) -> None:
        """Fix columns ``begin`` to ``end``; ``groups [end - begin]`` says which group of ``grid`` each belongs to."""
        scales, shifts, tops = grid.scale.T, grid.shift.T, grid.max_code
        for first in range(begin, end, BLOCK):
            last = min(first + BLOCK, end)
            own = groups[first - begin : last - begin]
            # One row per column, so that the loop reads and writes contiguous memory.
            self._block(first, last, scales[own].contiguous(), shifts[own].contiguous(), tops[own].contiguous())

    def _block(self, first: int, last: int, scale: Tensor, shift: Tensor, tops: Tensor) -> None:
        block = self.work[:, first:last].T.contiguous()  # [block, O]
        codes, errors = gptq_columns(block, self.factor[first:last, first:last].contiguous(), scale, shift, tops)
        self.codes[:, first:last] = codes.T
        if self.errors is not None and self.counted is not None:
            self.errors[first:last] = errors.square().double() @ self.counted.double()
        if last < self.work.shape[1]:
            self.work[:, last:].addmm_(errors.T, self.factor[first:last, last:], alpha=-1.0)

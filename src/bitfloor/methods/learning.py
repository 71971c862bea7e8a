"""Learning a block's matrices together against the float model's output: what methods with gradients share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, pack
from bitfloor.core.basis import Basis, basis_of
from bitfloor.core.heap import trim_heap
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, Learning, MatrixReport
from bitfloor.solvers.block_opt import Learnable, Outcome, Schedule, optimise
from bitfloor.solvers.columns import Columns, Share, joined, shares

FIXED_BATCHES = 4  # spread over the text; they decide which step is best

Units = dict[str, tuple[str, ...]]
Rounded = tuple[Tensor, Grid]


class Turned:
    """A learnable that was made of a matrix in another basis, seen from the block, which knows nothing of that."""

    def __init__(self, inner: Learnable, basis: Basis) -> None:
        self.inner, self.basis = inner, basis

    def fake_quantized(self) -> Tensor:
        return self.basis.back(self.inner.fake_quantized())

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        self.inner.step(self.basis.to(grad), rate, range_rate)

    def snapshot(self) -> Any:
        return self.inner.snapshot()


class Stacked:
    """Learnables of equally many rows each as one, row below row: experts that share nothing but their parameter."""

    def __init__(self, parts: Sequence[Learnable]) -> None:
        self.parts = parts

    def fake_quantized(self) -> Tensor:
        first = self.parts[0].fake_quantized()
        out = first.new_empty(len(self.parts), *first.shape)
        out[0] = first
        for place, part in zip(out[1:], self.parts[1:], strict=True):
            place.copy_(part.fake_quantized())
        return out.flatten(0, 1)

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        for part, own in zip(self.parts, grad.chunk(len(self.parts)), strict=True):
            part.step(own, rate, range_rate)

    def snapshot(self) -> Any:
        return [part.snapshot() for part in self.parts]


def turned(learnt: Learnable, spec: QuantSpec) -> Learnable:
    """What the block sees of a learnable made of a matrix in the basis that ``spec`` asks for."""
    basis = basis_of(spec)
    return Turned(learnt, basis) if basis else learnt


def units(block: Block, specs: Mapping[str, QuantSpec]) -> Units:
    """What is learnt as one matrix: each matrix by itself, but experts of one parameter together, row below row.

    Rounding knows nothing beyond its row, so the outcome is the same; but one call serves all experts of a layer, and
    none of them is copied back into the stack at every step. A stack of which some experts are stored differently, or
    are kept, is learnt one by one.

    Returns:
        names of the matrices by name of the unit, in the order of ``specs``.
    """
    stacked = {}
    for stack, names in block.stacks().items():
        wanted = {specs.get(name) for name in names}
        if len(wanted) == 1 and None not in wanted:
            stacked.update(dict.fromkeys(names, (stack, names)))
    return dict(stacked.get(name, (name, (name,))) for name in specs)


def learnable(
    weight: Tensor, spec: QuantSpec, make: Callable[[Tensor, QuantSpec, int], Learnable]
) -> tuple[Learnable, list[Share]]:
    """What learns a matrix: one learnable, or one for the groups of each width.

    Args:
        weight: ``[O, I]`` float32, in the basis of ``spec``.
        spec: storage.
        make: called as ``make(part [O, K], spec, index)`` with the columns of a width, their storage, and the number of
            the width among those that occur, narrow ones first.

    Returns:
        the learnable as the block sees it, and the shares whose snapshots it gives; none where there is one width.
    """
    size = spec.columns_per_group(weight.shape[1])
    found = shares(spec.group_widths(weight.shape[1]), size, weight.shape[1])
    if len(found) == 1:
        return turned(make(weight, replace(spec, bits=found[0].bits, widths=()), 0), spec), []
    parts = []
    for index, share in enumerate(found):
        # A group size in numbers: that of whole rows would be another for the part.
        own = replace(spec, bits=share.bits, group_size=size, widths=())
        parts.append((share, make(weight[:, share.columns.to(weight.device)].contiguous(), own, index)))
    return turned(Columns(parts, (weight.shape[0], weight.shape[1]), size), spec), found


def stack(parts: Sequence[Rounded]) -> Rounded:
    """Codes ``[O, I]`` and grids of the matrices of a unit as those of one matrix."""
    if len(parts) == 1:
        return parts[0]
    codes, grids = zip(*parts, strict=True)
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    offsets = [grid.offset for grid in grids if grid.offset is not None]
    grid = replace(
        grids[0],
        scale=torch.cat([g.scale for g in grids]),
        zero=torch.cat(zeros) if zeros else None,
        offset=torch.cat(offsets) if offsets else None,
    )
    return torch.cat(codes), grid


def split(tall: Units, best: Mapping[str, Any], of: Mapping[str, list[Share]]) -> dict[str, Rounded]:
    """Codes and grid of every matrix from those of the units, each in memory of its own.

    Args:
        tall: the units.
        best: snapshots by unit.
        of: shares by unit, as :func:`learnable` gave them.
    """
    found: dict[str, Rounded] = {}
    for unit, names in tall.items():
        parts = of[unit]
        codes, grid = joined(best[unit], parts, sum(len(p.columns) for p in parts)) if parts else best[unit]
        if len(names) == 1:
            found[names[0]] = (codes, grid)
            continue
        count = len(names)

        def cut(values: Tensor | None, count: int = count) -> list[Tensor | None]:
            return [None] * count if values is None else [part.clone() for part in values.chunk(count)]

        rows = zip(names, codes.chunk(count), cut(grid.scale), cut(grid.zero), cut(grid.offset), strict=True)
        for name, own, scale, zero, offset in rows:
            assert scale is not None
            found[name] = (own.clone(), replace(grid, scale=scale, zero=zero, offset=offset))
    return found


@dataclass(frozen=True)
class Objective:
    """What the loss of a block is.

    Args:
        suppress: share of the largest squared errors of a batch that it leaves out.
        both: add what the output is off from the float block's on the very same input, that of the quantized model. The
            float block runs once more for that at every step, so that nothing is held.
        cosine: add ``-log |mean_t cos(output_t, target_t)|`` (PTQ1.61, arXiv 2502.13179, after LRQuant).
    """

    suppress: float = 0.0
    both: bool = False
    cosine: bool = False

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss for an output and a target ``[B, T, D]``; the last position predicts nothing and is left out."""
        value = mean_square((output - target)[:, :-1], self.suppress)
        if not self.cosine:
            return value
        near = torch.cosine_similarity(output[:, :-1], target[:, :-1], dim=-1).mean().abs()
        return value - near.clamp_min(1e-8).log()


def learn_block(
    block: Block,
    inputs: Batches,
    targets: Batches,
    learnables: Mapping[str, Learnable],
    schedule: Schedule,
    objective: Objective | None = None,
) -> Outcome:
    """Learn all matrices of a block at once; snapshots of the best step.

    The quantized block sees what the quantized model feeds it; its output is compared with the float block's on what
    the float model feeds that. The last position of a sequence predicts nothing and is not compared.

    Args:
        block: the float block.
        inputs: its inputs in the quantized model.
        targets: its outputs in the float model, batch by batch the same tokens.
        learnables: by matrix name; the other matrices stay float.
        schedule: how to learn.
        objective: what the loss is; None for the mean square alone.
    """
    objective = objective or Objective()

    def loss(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        x, own = inputs[batch], None
        if objective.both:
            with torch.no_grad():
                own = block.forward(x, batch)
        output = block.forward(x, batch, weights)
        value = objective.of(output, targets[batch].to(output.device))
        return value if own is None else value + objective.of(output, own)

    every = range(len(inputs))
    return optimise(learnables, loss, every, spread(every, FIXED_BATCHES), schedule)


def learn_matrices(
    block: Block,
    inputs: Batches,
    targets: Batches,
    specs: Mapping[str, QuantSpec],
    make: Callable[[Tensor, QuantSpec, int], Learnable],
    schedule: Schedule,
    objective: Objective | None = None,
) -> BlockResult:
    """Learn all matrices of a block from what the weights alone say, and pack them.

    Args:
        block, inputs, targets, schedule, objective: as for :func:`learn_block`.
        specs: matrix name to storage.
        make: what learns the groups of one width, see :func:`learnable`.
    """
    result = BlockResult()
    if not specs:
        return result
    began = time.perf_counter()
    tall = units(block, specs)
    learnt, parts = {}, {}
    for unit, names in tall.items():
        spec = specs[names[0]]
        learnt[unit], parts[unit] = learnable(basis_of(spec).to(block.weight(unit)), spec, make)
    outcome = learn_block(block, inputs, targets, learnt, schedule, objective)
    seconds = (time.perf_counter() - began) / len(specs)
    result.learning = learning_of(outcome)
    rounded = split(tall, outcome.best, parts)
    for index, name in enumerate(specs):
        codes, grid = rounded[name]
        result.weights[name] = pack(codes, grid, basis_of(specs[name]))
        # What went wrong concerns the whole block; it is said once.
        result.reports[name] = MatrixReport(None, seconds, outcome.note if index == 0 else None)
    trim_heap()
    return result


def mean_square(difference: Tensor, suppress: float = 0.0) -> Tensor:
    """Mean of the squares, without a share of the largest ones.

    A few channels of a few tokens are a thousand times louder than the rest, and most of what is wrong with them was
    wrong before this block. Left in, they decide the signs of all gradients.

    Equation: the outlier-suppressed loss of SignRoundV2 (arXiv 2512.04746), which leaves out one in a thousand.

    Args:
        difference: any shape, float32.
        suppress: the share left out, 0 to 1, rounded down to whole elements; the mean is still over all.
    """
    squares = difference.square().flatten()
    count = int(suppress * squares.numel())
    if not count:
        return squares.mean()
    # Nothing flows back through which elements those are.
    limit = torch.topk(squares.detach(), count, sorted=True).values[-1]
    return torch.where(squares.detach() < limit, squares, squares.new_zeros(())).sum() / squares.numel()


def learning_of(outcome: Outcome) -> Learning:
    """What to report of an outcome."""
    return Learning(outcome.before, outcome.after, outcome.step, outcome.steps)


def spread(batches: range, count: int) -> list[int]:
    """Some of the batches, evenly spaced; all of them when they are fewer."""
    count = min(count, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]

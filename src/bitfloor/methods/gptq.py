"""GPTQ (arXiv 2210.17323) over a block: input group by input group, each seeing the quantized ones before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitfloor.calib.stats import DriftSum, HessianSum
from bitfloor.core.affine import Grid, decode, encode, pack
from bitfloor.core.basis import Basis, basis_of
from bitfloor.core.heap import trim_heap
from bitfloor.core.metrics import output_error
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.base import Batches, Block, BlockResult, MatrixReport, Need, stages
from bitfloor.methods.options import GptqConfig
from bitfloor.solvers.descent import descend
from bitfloor.solvers.gptq import Factor, GptqResult, GridSearch, factorise, gptq
from bitfloor.solvers.ranges import search_grid, tempered
from bitfloor.solvers.slim_sqc import sqc_grid

# Below this many calibration tokens per input channel the Hessian says more about the tokens than about the layer.
MIN_TOKENS_PER_CHANNEL = 0.25
# Shares of the correction that are tried where it is chosen, and the batches that decide: one in so many.
CORRECTIONS = (0.0, 0.5, 1.0)
HELD_OUT = 4


class Gptq:
    """Error-compensating rounding."""

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "GPTQ, arXiv 2210.17323"
    summary: ClassVar[str] = "rounding that spreads each column's error over the columns to come; minutes per model"
    Config: ClassVar[type[GptqConfig]] = GptqConfig
    tiers: ClassVar[None] = None
    learnt_bytes: ClassVar[int] = 0

    def __init__(self, config: GptqConfig, seed: int = 0) -> None:
        self.config = config

    @property
    def needs(self) -> frozenset[Need]:
        held = {Need.HELD_OUT} if self.config.choose else set()
        exact = {Need.EXACT} if self._paired else set()
        together = set() if self.config.sequential else {Need.TOGETHER}
        return frozenset({Need.INPUTS, Need.HESSIAN, *exact, *held, *together})

    @property
    def _paired(self) -> bool:
        return bool(self.config.correction) or self.config.choose

    def quantize_block(
        self,
        block: Block,
        inputs: Batches,
        specs: Mapping[str, QuantSpec],
        exact: Batches = (),
        targets: Batches = (),
    ) -> BlockResult:
        """See :class:`bitfloor.methods.base.Method`."""
        result = BlockResult()
        done: dict[str, Tensor] = {}
        order = stages(block, inputs, specs)
        if not self.config.sequential:
            order = [[group for stage in order for group in stage]]
        for stage in order:
            seen = {group[0]: self._seen(block, group[0]) for group in stage}
            if self._paired:
                block.observe_pairs(
                    exact, inputs, lambda name, e, x, seen=seen: seen[name].add_pair(e, x), list(seen), done or None
                )
            else:
                block.observe(inputs, lambda name, x, seen=seen: seen[name].hessian.add(x), list(seen), done or None)
            for group in stage:
                self._solve(block, group, seen.pop(group[0]), specs, result)
                for name in group:
                    done[name] = dequantize(result.weights[name])
                trim_heap()
        return result

    def _solve(
        self,
        block: Block,
        group: tuple[str, ...],
        seen: _Seen,
        specs: Mapping[str, QuantSpec],
        result: BlockResult,
    ) -> None:
        """Quantize the matrices of one input group; those of equal spec are swept together, row by row independent."""
        chosen = self._chosen(block, group, seen, specs)
        by_basis = {basis: seen.shown(basis) for basis in dict.fromkeys(basis_of(specs[name]) for name in group)}
        for spec in dict.fromkeys(specs[name] for name in group):
            began = time.perf_counter()
            names = [name for name in group if specs[name] == spec]
            basis = basis_of(spec)
            weights = [basis.to(block.weight(name)) for name in names]
            stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
            shown = by_basis[basis]
            config = replace(self.config, correction=chosen.get(spec, self.config.correction))
            solved, note = solve(stacked, shown, spec, config)
            if self.config.choose and spec not in chosen:
                kept = f"too little text to choose the correction; {self.config.correction:g} was kept"
                note = "; ".join(part for part in (kept, note) if part)
            seconds = (time.perf_counter() - began) / len(names)
            rows = [weight.shape[0] for weight in weights]
            parts = zip(
                names, solved.target.split(rows), solved.codes.split(rows), split_grid(solved.grid, rows), strict=True
            )
            for name, target, code, own in parts:
                error = output_error(target, decode(code, own), shown.hessian) if shown.rows else None
                result.weights[name] = pack(code, own, basis)
                told = {"correction": chosen[spec]} if spec in chosen else {}
                result.reports[name] = MatrixReport(error, seconds, note, told)

    def _seen(self, block: Block, name: str) -> _Seen:
        return _Seen(block.weight(name), self._paired, block.products, held=self.config.choose)

    def _chosen(
        self, block: Block, group: tuple[str, ...], seen: _Seen, specs: Mapping[str, QuantSpec]
    ) -> dict[QuantSpec, float]:
        """The correction that is best for the group's matrices of each spec, by error on batches that are held out.

        The error is that of the layer's output on the quantized model's inputs, against what the float model puts out
        on its own. Afterwards the held-out batches count like the others, so nothing is lost but time. Nothing is
        chosen where text is missing on either side.
        """
        found: dict[QuantSpec, float] = {}
        if seen.held is None:
            return found
        columns = block.weight(group[0]).shape[1]
        if seen.held.hessian.rows and seen.hessian.rows >= MIN_TOKENS_PER_CHANNEL * columns:
            given = self.config.correction
            bases = dict.fromkeys(basis_of(specs[name]) for name in group)
            sums = {basis: (seen.held.shown(basis), seen.shown(basis)) for basis in bases}
            for spec in dict.fromkeys(specs[name] for name in group):
                basis = basis_of(spec)
                weight = torch.cat([basis.to(block.weight(name)) for name in group if specs[name] == spec])
                held, shown = sums[basis]
                errors = {}
                # The given one comes first: it is kept where all are equal.
                for correction in dict.fromkeys((given, *CORRECTIONS)):
                    config = replace(self.config, correction=correction)
                    errors[correction] = drifted_error(weight, decoded(weight, shown, spec, config), held)
                found[spec] = min(errors, key=errors.__getitem__)
        seen.take_held()
        return found


def decoded(weight: Tensor, shown: Shown, spec: QuantSpec, config: GptqConfig) -> Tensor:
    """What :func:`solve` makes of a weight, as a weight ``[O, I]``."""
    solved, _ = solve(weight, shown, spec, config)
    return decode(solved.codes, solved.grid)


def solve(weight: Tensor, shown: Shown, spec: QuantSpec, config: GptqConfig) -> tuple[GptqResult, str | None]:
    """One stacked matrix on its grid, and a note when something other than plain GPTQ was done.

    Args:
        weight: ``[O, I]``, rotated if it is to be.
        shown: what the calibration text showed of its input, rotated likewise.
        spec: storage.
        config: how.
    """
    columns = weight.shape[1]
    hessian, rows = shown.hessian, shown.rows
    if rows < MIN_TOKENS_PER_CHANNEL * columns:
        grid = search_grid(weight, torch.ones(columns, device=weight.device), spec)
        note = f"saw {rows} calibration tokens for {columns} input channels; rounded to nearest instead"
        return GptqResult(encode(weight, grid), grid, config.damping, weight), note
    importance = tempered(hessian.diagonal(), config.importance) if config.range == "search" else None
    widths = torch.tensor(spec.group_widths(columns))

    def find(group: int, part: Tensor, at: Tensor) -> Grid:
        width = widths[group : group + 1]
        if config.range == "sqc":
            return sqc_grid(part, spec, width)
        return search_grid(part, None if importance is None else importance[at], spec, width)

    grids = GridSearch(spec.columns_per_group(columns), find, static=config.static_groups)
    solved = gptq(
        weight,
        hessian,
        grids,
        damping=config.damping,
        act_order=config.act_order,
        drift=shown.drift if config.correction else None,
        correction=config.correction,
        factor=shown.factor(grids.group_size, config),
    )
    if config.sweeps:
        codes, grid = descend(
            solved.target, solved.codes, solved.grid, hessian, damping=solved.damping, sweeps=config.sweeps
        )
        solved = replace(solved, codes=codes, grid=grid)
    note = None
    if solved.damping > config.damping:
        note = f"damping raised from {config.damping:g} to {solved.damping:g} to factorise the Hessian"
    return solved, note


class Errors:
    """What GPTQ leaves of a matrix's output error, group by group, for any widths: to compare widths by.

    Its scaled errors split the error of the output among columns, each with what the columns behind it have made up
    for. The error is that by the damped Hessian.

    Args:
        weight: ``[O, I]`` in the basis of ``spec``.
        hessian: ``[I, I]`` of its inputs, likewise.
        rows: ``[O]``, how much an output counts.
        spec: storage, widths aside.
        config: importance and damping.
    """

    def __init__(self, weight: Tensor, hessian: Tensor, rows: Tensor, spec: QuantSpec, config: GptqConfig) -> None:
        self.weight, self.hessian, self.rows = weight, hessian, rows
        self.size = spec.columns_per_group(weight.shape[1])
        self.spec = replace(spec, group_size=self.size, widths=())
        self.importance = tempered(hessian.diagonal(), config.importance)
        self.factor = factorise(hessian, self.size, damping=config.damping, act_order=True, whole_groups=True)

    def of(self, widths: Sequence[int]) -> Tensor:
        """``sum_i r_i sum_{j in k} e_ij^2`` of every group, float64 ``[G]``, with these widths."""
        bits = torch.tensor(widths)

        def find(group: int, part: Tensor, at: Tensor) -> Grid:
            return search_grid(part, self.importance[at], self.spec, bits[group : group + 1])

        grids = GridSearch(self.size, find)
        found = gptq(self.weight, self.hessian, grids, factor=self.factor, counted=self.rows).errors
        assert found is not None
        return found


@dataclass(frozen=True)
class Shown:
    """Sums over what entered a layer, ``X`` in the float model and ``X'`` in the quantized one.

    Args:
        hessian: ``X'^T X'`` ``[I, I]``.
        drift: ``(X - X')^T X'`` ``[I, I]``, or None.
        rows: tokens.
    """

    hessian: Tensor
    drift: Tensor | None
    rows: int
    _factors: dict[tuple[Any, ...], Factor] = field(default_factory=dict, repr=False)

    def factor(self, group_size: int, config: GptqConfig) -> Factor:
        """Order and factor for a sweep; made once for all matrices and corrections that want the same one."""
        key = (group_size, config.damping, config.act_order, config.static_groups)
        if key not in self._factors:
            self._factors[key] = factorise(
                self.hessian,
                group_size,
                damping=config.damping,
                act_order=config.act_order,
                whole_groups=not config.static_groups,
            )
            trim_heap()
        return self._factors[key]


def drifted_error(weight: Tensor, approximation: Tensor, shown: Shown) -> float:
    """``|X' W_hat^T - X W^T|^2`` less what no choice of ``W_hat`` changes.

    Equation, with ``D = W_hat - W``: ``tr(D H D^T) - 2 <D C^T, W>`` for the Hessian ``H`` and the drift ``C``.
    """
    assert shown.drift is not None
    difference = approximation - weight
    inner = difference @ shown.hessian - 2.0 * (weight @ shown.drift)
    return float((inner * difference).sum(dtype=torch.float64))


class _Seen:
    """What the calibration text showed of the input of one group.

    Args:
        weight: one of the group's matrices ``[O, I]``.
        paired: also how far that input has drifted from the float model's.
        products: type in which is multiplied.
        held: keep one batch in so many apart.
    """

    def __init__(self, weight: Tensor, paired: bool, products: torch.dtype, *, held: bool = False) -> None:
        self.hessian = HessianSum(weight.shape[1], weight.device)
        self.drift = DriftSum(weight.shape[1], weight.device, products) if paired else None
        self.held = _Seen(weight, paired, products) if held else None
        self._batches = 0

    def add_pair(self, exact: Tensor, x: Tensor) -> None:
        assert self.drift is not None
        self._batches += 1
        if self.held is not None and self._batches % HELD_OUT == 0:
            self.held.add_pair(exact, x)
            return
        self.hessian.add(x)
        self.drift.add(exact, x)

    def take_held(self) -> None:
        """Add what was kept apart."""
        assert self.held is not None and self.drift is not None and self.held.drift is not None
        self.hessian.total.add_(self.held.hessian.total)
        self.hessian.rows += self.held.hessian.rows
        self.drift.total.add_(self.held.drift.total)
        self.held = None

    def shown(self, basis: Basis) -> Shown:
        """The sums over inputs in a basis."""
        drift = None if self.drift is None else basis.both(self.drift.total)
        return Shown(basis.both(self.hessian.total), drift, self.hessian.rows)


def split_grid(grid: Grid, rows: Sequence[int]) -> list[Grid]:
    """The grids of matrices that were stacked along their rows."""
    scales = grid.scale.split(list(rows))
    zeros = [None] * len(rows) if grid.zero is None else grid.zero.split(list(rows))
    offsets = [None] * len(rows) if grid.offset is None else grid.offset.split(list(rows))
    return [
        Grid(scale, zero, offset, grid.bits, grid.group_size, grid.constant_zero, grid.scale_dtype)
        for scale, zero, offset in zip(scales, zeros, offsets, strict=True)
    ]

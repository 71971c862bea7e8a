"""What a method is to the pipeline: what it needs, and one function from a block to packed weights.

Methods declare, the pipeline decides: nothing outside a method's own file branches on its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bitfloor.core.packed import PackedWeight
from bitfloor.core.spec import QuantSpec


class Need(Enum):
    """What must be ready before a block can be quantized."""

    INPUTS = "inputs"  # the block's inputs as the quantized model produces them, with its call arguments
    EXACT = "exact"  # the block's inputs as the float model produces them
    TARGETS = "targets"  # what the float block makes of those: the outputs to aim at
    HESSIAN = "hessian"  # X^T X of each input group; those of one stage (all experts of a layer) are alive at once
    HELD_OUT = "held-out"  # the same once more, of some batches that are kept apart
    TOGETHER = "together"  # those of all input groups of a block at once
    GRADIENTS = "gradients"  # back-propagation through the block


Groups = list[tuple[str, ...]]


class Batches(Protocol):
    """Hidden states ``[B, T, D]`` by batch: a list of tensors, or one that reads them from disk."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def __getitem__(self, index: int, /) -> Tensor: ...


class Block(Protocol):
    """The part of :class:`bitfloor.calib.block.BlockRunner` that methods use."""

    products: torch.dtype  # in which its matrices are multiplied

    def weight(self, name: str) -> Tensor:
        """Float32 ``[O, I]`` of a matrix by public name."""

    def forward(self, x: Tensor, batch: int, overrides: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output ``[B, T, D]`` with some matrices replaced."""

    def observe(
        self,
        xs: Iterable[Tensor],
        fn: Callable[[str, Tensor], None],
        names: Iterable[str],
        overrides: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Call ``fn(name, x [N, I])`` with everything that enters the named matrices."""

    def observe_pairs(
        self,
        exact: Iterable[Tensor],
        xs: Iterable[Tensor],
        fn: Callable[[str, Tensor, Tensor], None],
        names: Iterable[str],
        overrides: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Call ``fn(name, exact [N, I], x [N, I])``: what enters a matrix in the float model, and here."""

    def input_groups(self, x: Tensor, batch: int = 0) -> Groups:
        """Matrices fed by the same tensor, in order of execution."""

    def stages(self, groups: Groups) -> list[Groups]:
        """Groups that do not feed each other, merged: the same projection of all experts is one stage."""

    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Matrices that lie on top of each other in one parameter (experts), in order, by a name of their own.

        `weight` and `forward` take that name as well: all of them as one matrix, row below row.
        """


@dataclass(frozen=True)
class MatrixReport:
    """What is known of one quantized matrix.

    Args:
        output_error: relative squared error of the layer's output on the calibration inputs, against the output
            that was aimed at; None if no text was read.
        seconds: time spent on it; a share of its group's when matrices were solved together.
        note: a fallback that was taken, in words, or None.
        chosen: options that were chosen for this matrix.
    """

    output_error: float | None
    seconds: float
    note: str | None = None
    chosen: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Learning:
    """How the learning of a block went.

    Args:
        before, after: loss on the batches that decide, at the start and at the step that was kept.
        step: the step that was kept.
        steps: updates that were made.
    """

    before: float
    after: float
    step: int
    steps: int


@dataclass
class BlockResult:
    """The packed weights of one block by public name, and what to report."""

    weights: dict[str, PackedWeight] = field(default_factory=dict)
    reports: dict[str, MatrixReport] = field(default_factory=dict)
    learning: Learning | None = None


class Method(Protocol):
    """A quantization method, configured."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[Any]]

    def __init__(self, config: Any, seed: int = 0) -> None: ...

    @property
    def tiers(self) -> Callable[[int], list[tuple[int, int]]] | None:
        """Where whole input channels are stored at widths of the method's own: ``(columns, bits)`` of the segments that
        a matrix with so many input channels is stored as. None where the storage says it all."""

    @property
    def learnt_bytes(self) -> int:
        """Bytes held for a weight while it is learnt, beside the weight; 0 for methods that do not learn."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the pipeline must prepare."""

    def quantize_block(
        self,
        block: Block,
        inputs: Batches,
        specs: Mapping[str, QuantSpec],
        exact: Batches = (),
        targets: Batches = (),
    ) -> BlockResult:
        """Quantize the matrices named in ``specs``; the others of the block stay float.

        Args:
            block: the float block.
            inputs: its inputs in the quantized model, one ``[B, T, D]`` float32 a batch; empty when not needed.
            specs: matrix name to storage.
            exact: the block's inputs in the float model, batch by batch the same tokens; empty without `Need.EXACT`.
            targets: its outputs there, on those inputs; empty without `Need.TARGETS`.
        """


def stages(block: Block, inputs: Batches, names: Iterable[str]) -> list[Groups]:
    """Input groups of the wanted matrices that can be observed in one pass, in order of execution."""
    wanted = set(names)
    members = (tuple(name for name in group if name in wanted) for group in block.input_groups(inputs[0]))
    return block.stages([group for group in members if group])

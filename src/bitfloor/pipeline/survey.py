"""A look at the whole float model before it is quantized: how much each weight matters to the next token.

| symbol | meaning |
| --- | --- |
| ``L_s`` | negative log-likelihood of a sequence ``s`` whose labels are drawn from the float model's own distribution |
| ``G_s [O, I]`` | ``dL_s/dW``, of a matrix, in the basis it will be stored in |
| ``F [O, I]`` | ``sum_s G_s^2 / T``: the diagonal of the Fisher information of ``T`` tokens |
| ``H [I, I]`` | ``sum_t x_t x_t^T / T`` of the matrix's inputs, likewise |
| ``r [O]`` | ``sum_j F_ij / tr H``: how much an output counts |
| ``H' [I, I]`` | ``H`` with its rows and columns scaled so that its diagonal is in proportion to ``sum_i F_ij`` |

To second order, moving ``W`` by ``D`` moves the model's distribution by

    sum_i r_i (D H' D^T)_ii / 2         nats a token (Kullback-Leibler)

as far as gradients and inputs are independent but for the scaling, and outputs of each other. Distortions of groups in
different layers are in one unit, which the error of a layer's own output is not. The correlation of inputs must be in
it: GPTQ makes use of it, in some layers many times more than in others.

Forward through all blocks once, their inputs kept on disk; then back, block by block, so that no more than one block
and its gradients are in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import Call, capture
from bitfloor.calib.stats import HessianSum
from bitfloor.calib.streams import Stream
from bitfloor.core.basis import Basis, by_size
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.linalg import all_finite
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.student import Head, gives_tuple


@dataclass(frozen=True, eq=False)
class Stakes:
    """What is known of one matrix.

    Args:
        rows: ``r [O]`` float32.
        hessian: ``H' [I, I]`` float32.
        tokens: that entered it.
        basis: that ``H'`` is in.
    """

    rows: Tensor
    hessian: Tensor
    tokens: int
    basis: Basis = field(default_factory=Basis)


Visit = Callable[[BlockRunner, Iterator[tuple[str, Stakes]]], None]


class Ends(Protocol):
    """Whoever looks at what is outside the blocks during a survey."""

    def leaving(self, rows: Sequence[Tensor], hidden: Iterable[Tensor]) -> None:
        """Token ids ``[1, T]`` of every sequence and what leaves the last block; the outer modules are loaded."""

    def entering(self, rows: Sequence[Tensor], flow: Iterable[Tensor]) -> None:
        """The same, and the gradient of each sequence's loss with respect to what enters the first block."""


@dataclass(frozen=True)
class SurveyOptions:
    """How a survey is carried out.

    Args:
        products: type in which the quantizable matrices are multiplied.
        device: where blocks are computed.
        seed: of the labels.
        folder: for what enters each block, removed in the end; None keeps it in memory.
        sort: put input channels into order of their second moment.
    """

    products: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    folder: Path | None = None
    sort: bool = False


@torch.no_grad()
def survey(
    source: SourceModel,
    batches: Sequence[Tensor],
    rotations: Mapping[str, int],
    visit: Visit,
    options: SurveyOptions,
    ends: Ends | None = None,
) -> None:
    """Show what is at stake in every block's matrices, last block first.

    Args:
        source: the float model.
        batches: token ids ``[B, T]``; sequences are treated one by one.
        rotations: by the name of every matrix that is looked at.
        visit: called as ``visit(runner, stakes)`` for every block, with names and stakes of its matrices, one by one.
        options: how.
        ends: told what leaves the last block, and the gradients of what enters the first.

    Raises:
        BitfloorError: a gradient is not finite.
    """
    device = options.device
    rows = [row.unsqueeze(0).to(device) for batch in batches for row in batch]
    source.load_outer(device)
    states = [_stream(options, "first")]
    try:
        captured = capture(source.skeleton, source.map.blocks_path, rows, states[0])
        for k in range(source.map.n_blocks):
            runner = _runner(source, k, captured.calls, options)
            states.append(_stream(options, f"block-{k}"))
            for i, x in enumerate(states[-2]):
                states[-1].append(runner.forward(x, i))
            source.release_block(k)
        if ends is not None:
            ends.leaving(rows, states[-1])
        last, flow = states.pop(), _stream(options, "flow")
        states.insert(0, flow)
        _start_flow(source, rows, last, flow, options)
        last.close()
        source.release_outer()
        tokens = sum(row.numel() for row in rows)
        for k in reversed(range(source.map.n_blocks)):
            runner = _runner(source, k, captured.calls, options)
            inputs = states.pop()
            own = {name: rotations[name] for name in runner.names if name in rotations}
            sums = _inputs(runner, inputs, own)
            bases = {n: Basis(by_size(sums[n].total.diagonal()) if options.sort else b"", r) for n, r in own.items()}
            visit(runner, _stakes(_fisher(runner, inputs, flow, bases, tokens), sums, bases, tokens))
            inputs.close()
            source.release_block(k)
            trim_heap()
        if ends is not None:
            ends.entering(rows, flow)
    finally:
        for stream in states:
            stream.close()
        if options.folder is not None:
            shutil.rmtree(options.folder, ignore_errors=True)


def _runner(source: SourceModel, k: int, calls: Sequence[Sequence[Call]], options: SurveyOptions) -> BlockRunner:
    module = source.load_block(k, options.device)
    return BlockRunner(module, source.map.block_path(k), source.map.block_matrices(k), calls[k], options.products)


def _stream(options: SurveyOptions, name: str) -> Stream:
    return Stream(folder=None if options.folder is None else options.folder / name)


def _start_flow(
    source: SourceModel, rows: Sequence[Tensor], last: Stream, flow: Stream, options: SurveyOptions
) -> None:
    """Fill ``flow``: the gradient of every sequence's loss with respect to what leaves the last block."""
    head = Head(source, options.products, as_tuple=gives_tuple(source, rows[0], options.device))
    generator = torch.Generator(options.device).manual_seed(options.seed)
    for ids, hidden in zip(rows, last, strict=True):
        leaf = hidden.to(options.device).requires_grad_()
        with torch.enable_grad():
            logs = head.logits(ids, leaf, {})[0, :-1].log_softmax(-1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            torch.autograd.backward(-logs.gather(1, labels).sum())
        assert leaf.grad is not None
        flow.append(leaf.grad)


def _inputs(runner: BlockRunner, inputs: Stream, names: Mapping[str, int]) -> dict[str, HessianSum]:
    """``X^T X`` of the matrices' inputs; those fed by one tensor share one sum."""
    found: dict[str, HessianSum] = {}
    leaders = []
    for group in runner.input_groups(inputs[0]):
        wanted = [name for name in group if name in names]
        if wanted:
            weight = runner.weight(wanted[0])
            found.update(dict.fromkeys(wanted, HessianSum(weight.shape[1], weight.device)))
            leaders.append(wanted[0])
    runner.observe(inputs, lambda name, x: found[name].add(x), leaders)
    return found


def _stakes(
    fisher: Mapping[str, tuple[Tensor, Tensor]],
    sums: Mapping[str, HessianSum],
    bases: Mapping[str, Basis],
    tokens: int,
) -> Iterator[tuple[str, Stakes]]:
    for name, (rows, columns) in fisher.items():
        hessian = bases[name].both(sums[name].total) / tokens
        diagonal = hessian.diagonal().clamp_min(0.0)
        trace = diagonal.sum().clamp_min(1e-30)
        share = (columns / columns.sum().clamp_min(1e-30)) / (diagonal / trace).clamp_min(1e-30)
        scaling = torch.where(diagonal > 0, share, 0.0).sqrt()
        hessian.mul_(scaling.unsqueeze(1)).mul_(scaling)
        yield name, Stakes(rows / trace, hessian, sums[name].rows, bases[name])


def _fisher(
    runner: BlockRunner, inputs: Stream, flow: Stream, bases: Mapping[str, Basis], tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums of ``F`` over columns ``[O]`` and rows ``[I]``; ``flow`` becomes the gradient of what enters, in place."""
    found = {}
    device = next(runner.module.parameters()).device
    for name in bases:
        rows, columns = runner.ref(name).shape
        found[name] = (torch.zeros(rows, device=device), torch.zeros(columns, device=device))
    weights = {name: runner.weight(name).clone() for name in bases}
    for i, x in enumerate(inputs):
        # What lies on disk comes back on the CPU.
        gradient = flow[i].to(device)
        leaf = x.to(device).requires_grad_()
        for weight in weights.values():
            weight.requires_grad_().grad = None
        with torch.enable_grad():
            torch.autograd.backward(runner.forward(leaf, i, weights), gradient)
        for name, weight in weights.items():
            if weight.grad is not None:
                squares = bases[name].to(weight.grad).square()
                found[name][0].add_(squares.sum(1), alpha=1.0 / tokens)
                found[name][1].add_(squares.sum(0), alpha=1.0 / tokens)
        assert leaf.grad is not None
        flow[i] = leaf.grad
    for name, (total, _) in found.items():
        if not all_finite(total):
            raise BitfloorError(f"the gradients of {name} are not finite; check the model, or calibrate in float32.")
    return found

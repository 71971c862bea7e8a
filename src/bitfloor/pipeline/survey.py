"""A look at the whole float model before it is quantized: how much each weight matters to the next token.

| symbol | meaning |
| --- | --- |
| ``L_s`` | negative log-likelihood of a sequence ``s`` whose labels are drawn from the float model's own distribution |
| ``G_s [O, I]`` | ``dL_s/dW``, of a matrix, rotated as it will be stored |
| ``F [O, I]`` | ``sum_s G_s^2 / T``: the diagonal of the Fisher information of ``T`` tokens |

To second order, and as far as weights act by themselves, moving ``W`` by ``D`` moves the model's distribution by
``sum F D^2 / 2`` nats a token (Kullback-Leibler). Distortions of groups in different layers are in one unit, which the
error of a layer's own output is not.

Forward through all blocks once, their inputs kept on disk; then back, block by block, so that no more than one block
and its gradients are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import Call, capture
from bitfloor.calib.streams import Stream
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.linalg import all_finite
from bitfloor.core.rotation import rotate
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.student import Head, gives_tuple

Visit = Callable[[int, BlockRunner, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class SurveyOptions:
    """How a survey is carried out.

    Args:
        products: type in which the quantizable matrices are multiplied.
        device: where blocks are computed.
        seed: of the labels.
        folder: for what enters each block; None keeps it in memory.
    """

    products: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    folder: Path | None = None


@torch.no_grad()
def survey(
    source: SourceModel,
    batches: Sequence[Tensor],
    rotations: Mapping[str, int],
    visit: Visit,
    options: SurveyOptions,
) -> None:
    """Show the Fisher information of every block's matrices, last block first.

    Args:
        source: the float model.
        batches: token ids ``[B, T]``; sequences are treated one by one.
        rotations: by the name of every matrix that is looked at.
        visit: called as ``visit(block, runner, fisher)`` with ``F [O, I]`` float32 by name.
        options: how.

    Raises:
        BitfloorError: a gradient is not finite.
    """
    device = options.device
    rows = [row.unsqueeze(0).to(device) for batch in batches for row in batch]
    source.load_outer(device)
    captured = capture(source.skeleton, source.map.blocks_path, rows)
    states = [captured.hidden]
    for k in range(source.map.n_blocks):
        runner = _runner(source, k, captured.calls, options)
        stream = Stream(folder=None if options.folder is None else options.folder / f"block-{k}")
        for i, x in enumerate(states[-1]):
            stream.append(runner.forward(x, i))
        states.append(stream)
        source.release_block(k)
    try:
        flow = _flow(source, rows, states.pop(), options)
        source.release_outer()
        tokens = sum(row.numel() for row in rows)
        for k in reversed(range(source.map.n_blocks)):
            runner = _runner(source, k, captured.calls, options)
            inputs = states.pop()
            visit(
                k,
                runner,
                _fisher(runner, inputs, flow, {n: rotations[n] for n in runner.names if n in rotations}, tokens),
            )
            inputs.close()
            source.release_block(k)
            trim_heap()
    finally:
        for stream in states:
            stream.close()


def _runner(source: SourceModel, k: int, calls: Sequence[Sequence[Call]], options: SurveyOptions) -> BlockRunner:
    module = source.load_block(k, options.device)
    return BlockRunner(module, source.map.block_path(k), source.map.block_matrices(k), calls[k], options.products)


def _flow(source: SourceModel, rows: Sequence[Tensor], last: Stream, options: SurveyOptions) -> list[Tensor]:
    """The gradient of every sequence's loss with respect to what leaves the last block."""
    head = Head(source, options.products, as_tuple=gives_tuple(source, rows[0], options.device))
    generator = torch.Generator(options.device).manual_seed(options.seed)
    found = []
    for ids, hidden in zip(rows, last, strict=True):
        leaf = hidden.to(options.device).requires_grad_()
        with torch.enable_grad():
            logs = head.logits(ids, leaf, {})[0, :-1].log_softmax(-1)
            labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            torch.autograd.backward(-logs.gather(1, labels).sum())
        assert leaf.grad is not None
        found.append(leaf.grad)
    last.close()
    return found


def _fisher(
    runner: BlockRunner, inputs: Stream, flow: list[Tensor], rotations: Mapping[str, int], tokens: int
) -> dict[str, Tensor]:
    """``F`` of the block's matrices; ``flow`` becomes the gradient with respect to the block's inputs, in place."""
    found = {name: torch.zeros_like(runner.weight(name)) for name in rotations}
    weights = {name: runner.weight(name).clone() for name in rotations}
    for i, x in enumerate(inputs):
        leaf = x.to(flow[i].device).requires_grad_()
        for weight in weights.values():
            weight.requires_grad_().grad = None
        with torch.enable_grad():
            torch.autograd.backward(runner.forward(leaf, i, weights), flow[i])
        for name, weight in weights.items():
            if weight.grad is not None:
                found[name].addcmul_(*(2 * [rotate(weight.grad, rotations[name])]), value=1.0 / tokens)
        assert leaf.grad is not None
        flow[i] = leaf.grad
    for name, total in found.items():
        if not all_finite(total):
            raise BitfloorError(f"the gradients of {name} are not finite; check the model, or calibrate in float32.")
    return found

"""The quantized model while its scales and norms are tuned: codes in memory, passes through all blocks, the head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from bitfloor.calib.block import BlockRunner, Prepared
from bitfloor.calib.capture import Call
from bitfloor.calib.streams import Stream
from bitfloor.core.bitpack import blocked
from bitfloor.core.heap import trim_heap
from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.formats import native
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.journal import ENDS, Journal, part_name
from bitfloor.solvers.scales import TunedScales, tunable

if TYPE_CHECKING:
    from bitfloor.pipeline.run import RunOptions  # which rounds the head by what is here

Update = Callable[[str, Tensor, Tensor], None]  # name, parameter, gradient


class Stage(Protocol):
    """What the student needs of the stage that tunes it."""

    source: SourceModel
    journal: Journal
    options: RunOptions

    @property
    def norms(self) -> bool: ...
    @property
    def head(self) -> bool: ...
    def runner(self, k: int, calls: Sequence[Sequence[Call]]) -> BlockRunner: ...


@dataclass
class Part:
    """One block of the quantized model.

    Args:
        runner: the block, its quantized matrices without memory.
        scales: of its tunable matrices by public name.
        fixed: its other quantized matrices.
        vectors: local to full name of the norm weights that are learnt.
    """

    runner: BlockRunner
    scales: dict[str, TunedScales]
    fixed: dict[str, PackedWeight]
    vectors: dict[str, str]


@dataclass
class Lexicon:
    """A quantized head that is learnt: its public name, its parameter, its scales."""

    name: str
    param: str
    scales: TunedScales


class Student:
    """The quantized model: codes, small parameters, and passes through it."""

    def __init__(
        self,
        stage: Stage,
        calls: Sequence[Sequence[Call]],
        inputs: Stream,
        batches: Sequence[Tensor],
        head: Head,
        tables: Mapping[str, Tensor],
    ) -> None:
        self.inputs, self.batches, self.head, self.tables = inputs, batches, head, dict(tables)
        self.parameters: dict[str, Tensor] = {}
        self.kinds: dict[str, torch.dtype] = {}  # of learnt vectors, as stored
        self.parts = [self._part(stage, k, calls) for k in range(stage.source.map.n_blocks)]
        self.lexicon = self._lexicon(stage) if stage.head else None
        self.final: list[str] = []
        if stage.norms:
            prefix = f"{stage.source.map.blocks_path}."
            model = stage.source.skeleton
            for name in stage.source.map.kept:
                if not name.startswith(prefix) and _is_norm(name, model):
                    self._learn(name, model.get_parameter(name).detach(), stage.source.read(name).dtype)
                    self.final.append(name)

    def _lexicon(self, stage: Stage) -> Lexicon | None:
        """The head's scales to learn, if it is a matrix of its own that has some."""
        ref, entry = stage.source.map.head, stage.journal.get(ENDS)
        if ref is None or ref.name not in entry.facts["layouts"]:
            return None
        layout = entry.facts["layouts"][ref.name]
        weight = native.decode(ref.name, layout, lambda full: entry.tensors[full].to(stage.options.device))
        if not tunable(weight):
            return None
        found = Lexicon(ref.name, ref.param, TunedScales(weight))
        self.parameters[f"{ref.name}.scale"] = found.scales.factor
        self.tables.pop(ref.param, None)
        return found

    def _learn(self, name: str, start: Tensor, stored: torch.dtype) -> None:
        self.parameters[name] = start.float().clone()
        self.kinds[name] = stored

    def _part(self, stage: Stage, k: int, calls: Sequence[Sequence[Call]]) -> Part:
        entry, source = stage.journal.get(part_name(k)), stage.source
        runner = stage.runner(k, calls)
        scales, fixed = {}, {}
        for name, layout in entry.facts["layouts"].items():
            first = entry.facts.get("orders", {}).get(name)
            weight = native.decode(name, layout, lambda full: entry.tensors[full].to(stage.options.device), first)
            if tunable(weight):
                scales[name] = TunedScales(weight)
                self.parameters[f"{name}.scale"] = scales[name].factor
            else:
                fixed[name] = weight
        prefix = f"{source.map.block_path(k)}."
        vectors = {}
        if stage.norms:
            for name in source.map.kept:
                if name.startswith(prefix) and _is_norm(name, source.skeleton):
                    self._learn(name, source.skeleton.get_parameter(name).detach(), source.read(name).dtype)
                    vectors[name.removeprefix(prefix)] = name
        for param in {runner.ref(name).param for name in entry.facts["layouts"]}:
            # The float matrix is never used again; its shape is.
            own = source.skeleton.get_parameter(param)
            own.data = own.data.new_zeros(()).expand(own.shape)
        trim_heap()
        return Part(runner, scales, fixed, vectors)

    # -- parameters --------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.parameters.items()}

    def restore(self, parameters: Mapping[str, Tensor]) -> None:
        for name, tensor in parameters.items():
            self.parameters[name].copy_(tensor)

    def stored(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the checkpoint that these parameters stand for."""
        self.restore(parameters)
        tensors = {name: self._vector(name).to(kind).cpu() for name, kind in self.kinds.items()}
        learnt = {name: scales for part in self.parts for name, scales in part.scales.items()}
        if self.lexicon is not None:
            learnt[self.lexicon.name] = self.lexicon.scales
        for name, scales in learnt.items():
            tensors |= {f"{name}.{part}": blocked(values).cpu() for part, values in scales.tensors().items()}
        return tensors

    def _vector(self, name: str) -> Tensor:
        """A learnt vector, as stored."""
        return self.parameters[name].to(self.kinds[name], copy=True).float()

    # -- passes ------------------------------------------------------------------------------------------------------

    def _leaves(self, part: Part) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Dense tunable matrices by public name and learnt vectors by local name, at the present parameters."""
        dense = {name: scales.dense() for name, scales in part.scales.items()}
        return dense, {local: self._vector(name) for local, name in part.vectors.items()}

    @staticmethod
    def _overrides(part: Part, dense: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> Prepared:
        """All that replaces the block's own parameters."""
        prepared = part.runner.prepare({**dense, **{name: dequantize(w) for name, w in part.fixed.items()}})
        prepared.update(vectors)
        return prepared

    @torch.no_grad()
    def _forward(self, batch: int) -> list[Tensor]:
        """What enters every block, and what leaves the last."""
        states = [self.inputs[batch].to(self.batches[batch].device)]
        for part in self.parts:
            states.append(part.runner.forward(states[-1], batch, self._overrides(part, *self._leaves(part))))
        return states

    @torch.no_grad()
    def divergence(self, batch: int, target: Tensor) -> float:
        """Mean divergence on a batch whose last hidden states in the float model are ``target``."""
        hidden = self._forward(batch)[-1]
        return sum(float(value) for value in self._losses(batch, hidden, target, self._outer_leaves()))

    def _outer_leaves(self) -> dict[str, Tensor]:
        """What is learnt behind the blocks, by parameter name, at the present parameters."""
        leaves = {name: self._vector(name) for name in self.final}
        if self.lexicon is not None:
            leaves[self.lexicon.param] = self.lexicon.scales.dense()
        return leaves

    def _losses(self, batch: int, hidden: Tensor, target: Tensor, leaves: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The mean divergence in shares, sequence by sequence: logits of a whole batch would be the largest tensor."""
        ids = self.batches[batch]
        for i in range(len(ids)):
            row = slice(i, i + 1)
            with torch.no_grad():
                aim = self.head.logits(ids[row], target[row].to(hidden.device), {}).log_softmax(-1)
            found = self.head.logits(ids[row], hidden[row], {**self.tables, **leaves}).log_softmax(-1)
            yield (aim.exp() * (aim - found)).sum() / ids.numel()

    def step(self, batch: int, target: Tensor, update: Update) -> float:
        """One update of everything; the mean divergence before it. Nothing moves when that is not finite."""
        states = self._forward(batch)
        hidden = states.pop().requires_grad_()
        leaves = {name: leaf.requires_grad_() for name, leaf in self._outer_leaves().items()}
        total = 0.0
        with torch.enable_grad():
            for loss in self._losses(batch, hidden, target, leaves):
                total += float(loss.detach())
                torch.autograd.backward(loss)
        if not math.isfinite(total):
            return total
        flow = hidden.grad
        if self.lexicon is not None and (grad := leaves.pop(self.lexicon.param).grad) is not None:
            scales = self.lexicon.scales
            update(f"{self.lexicon.name}.scale", scales.factor, scales.gradient(grad))
        self._update(leaves, {name: name for name in leaves}, update)
        for k in reversed(range(len(self.parts))):
            flow = self._back(self.parts[k], states.pop().requires_grad_(k > 0), flow, batch, update)
        return total

    def _back(self, part: Part, state: Tensor, flow: Tensor | None, batch: int, update: Update) -> Tensor | None:
        """One block again, with gradients, and the update of what it holds; the gradient of what entered it."""
        dense, vectors = self._leaves(part)
        for leaf in (*dense.values(), *vectors.values()):
            leaf.requires_grad_()
        with torch.enable_grad():
            output = part.runner.forward(state, batch, self._overrides(part, dense, vectors))
            if output.requires_grad:
                torch.autograd.backward(output, flow)
        for name, weight in dense.items():
            if weight.grad is not None:
                scales = part.scales[name]
                update(f"{name}.scale", scales.factor, scales.gradient(weight.grad))
                weight.grad = None
        self._update(vectors, part.vectors, update)
        return state.grad

    def _update(self, vectors: Mapping[str, Tensor], names: Mapping[str, str], update: Update) -> None:
        for local, leaf in vectors.items():
            if leaf.grad is not None:
                update(names[local], self.parameters[names[local]], leaf.grad)


class Head:
    """Final norm and head by the model's own forward, with gradients.

    Args:
        source: its outer modules loaded.
        products: type of the head's product.
        as_tuple: blocks of this model return tuples.
    """

    def __init__(self, source: SourceModel, products: torch.dtype, *, as_tuple: bool) -> None:
        self.model, self.products, self.as_tuple = source.skeleton, products, as_tuple
        self.blocks = list(source.skeleton.get_submodule(source.map.blocks_path).children())

    def logits(self, ids: Tensor, hidden: Tensor, overrides: Mapping[str, Tensor]) -> Tensor:
        """``[B, T, V]`` float32 for last hidden states ``[B, T, D]``; ``overrides`` by full parameter name."""
        mixed = torch.autocast(hidden.device.type, self.products, enabled=self.products is not torch.float32)
        with _giving(self.blocks, (hidden,) if self.as_tuple else hidden), mixed:
            found = functional_call(self.model, dict(overrides), (), {"input_ids": ids, "use_cache": False})
        logits: Tensor = found.logits.float()
        return logits

    def inputs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """What reaches the head ``[B, T, D]`` for last hidden states ``[B, T, D]``; the head itself is not run."""
        seen: list[Tensor] = []

        def note(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0])
            raise _Reached

        handle = self.model.get_output_embeddings().register_forward_pre_hook(note)
        try:
            self.logits(ids, hidden, {})
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0]


class _Reached(Exception):
    """A forward has come as far as is of interest."""


def gives_tuple(source: SourceModel, batch: Tensor, device: str) -> bool:
    """Whether the model expects its blocks to return tuples, found by trying the other."""
    piece = batch[:1, :2]
    width = int(source.config.get_text_config().hidden_size)
    hidden = torch.zeros(1, piece.shape[1], width, device=device)
    try:
        Head(source, torch.float32, as_tuple=False).logits(piece, hidden, {})
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return True
    return False


@contextmanager
def _giving(blocks: Sequence[torch.nn.Module], output: Any) -> Iterator[None]:
    """Every block returns ``output``, whatever it is called with."""
    try:
        for block in blocks:
            block.forward = lambda *_, **__: output
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@contextmanager
def poured(source: SourceModel, tables: Mapping[str, Tensor]) -> Iterator[None]:
    """Parameters of the skeleton with other contents."""
    before = {name: source.skeleton.get_parameter(name).data for name in tables}
    try:
        for name, table in tables.items():
            source.skeleton.get_parameter(name).data = table
        yield
    finally:
        for name, data in before.items():
            source.skeleton.get_parameter(name).data = data


def _is_norm(name: str, model: torch.nn.Module) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return name.endswith(".weight") and "norm" in type(owner).__name__.lower() and model.get_parameter(name).dim() == 1

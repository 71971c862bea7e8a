"""What each block is called with, found by running the model's own forward with the blocks taken out.

Every block is replaced by a *recorder* that notes its arguments and hands the hidden state on unchanged. No block
weights are needed: whatever a block receives besides the hidden state (masks, position tables) is made outside the
blocks. That this is true for the model at hand is checked, not assumed: the same forward is run again with recorders
that change the hidden state, and a model whose other arguments change with it passes data between its blocks in a way
that cannot be replayed block by block. It is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitfloor.calib.streams import Stream
from bitfloor.core.errors import BitfloorError, InputError

_HIDDEN_NAMES = ("hidden_states", "hidden_state", "x", "inputs_embeds")
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, without the hidden state.

    Args:
        args, kwargs: as the model passed them; the place of the hidden state holds None.
        slot: where the hidden state goes: a position in ``args``, or a key of ``kwargs``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str

    def bind(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The full arguments with ``hidden [B, T, D]`` in place."""
        if isinstance(self.slot, int):
            return (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]), self.kwargs
        return self.args, {**self.kwargs, self.slot: hidden}


@dataclass
class Capture:
    """What the blocks of a model are fed.

    Args:
        hidden: per batch, the input ``[B, T, D]`` of the first block.
        calls: per block, per batch, the other arguments; equal tensors are stored once.
    """

    hidden: Stream = field(default_factory=Stream)
    calls: list[list[Call]] = field(default_factory=list)


class _Recorder(nn.Module):
    """Stands in for a block: notes the call, returns the hidden state; anything else asked of it goes to the block."""

    def __init__(self, block: nn.Module, note: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not registered: the block must not become a submodule here
        self._note = note

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = _split(args, kwargs)
        return self._note(hidden, call)


def capture(model: nn.Module, blocks_path: str, batches: Sequence[Tensor], hidden: Stream | None = None) -> Capture:
    """Record what every block is called with.

    Args:
        model: the causal language model, outer modules loaded, blocks may be on meta; it is left as it was.
        blocks_path: the ``ModuleList`` of blocks.
        batches: token ids, each int64 ``[B, T]``, unpadded, on the model's device.
        hidden: an empty stream for the first block's inputs, to have them spilled as they are made; None = in memory.

    Returns:
        the first block's inputs and every block's other arguments.

    Raises:
        InputError: the model's blocks exchange data in a way that cannot be replayed block by block.
    """
    result = Capture(hidden=Stream() if hidden is None else hidden)
    store = _Store()
    as_tuple = _probe(model, blocks_path, batches[0]) if batches else False
    with torch.no_grad():
        for batch in batches:
            seen = _pass(model, blocks_path, batch, lambda h: h, as_tuple)
            result.hidden.append(seen[0][0])
            if not result.calls:
                result.calls = [[] for _ in seen]
            for k, (_, call) in enumerate(seen):
                result.calls[k].append(store.intern(call))
    return result


def run_tail(model: nn.Module, blocks_path: str, batch: Tensor, hidden: Tensor) -> Tensor:
    """Final norm and head on the output of the last block, by the model's own forward.

    Args:
        model: outer modules loaded, head included; blocks may be on meta.
        blocks_path: the ``ModuleList`` of blocks.
        batch: the token ids ``[B, T]`` that ``hidden`` came from.
        hidden: output ``[B, T, D]`` of the last block.

    Returns:
        logits ``[B, T, V]``.
    """
    as_tuple = _probe(model, blocks_path, batch)
    blocks = _module_list(model, blocks_path)

    def note(k: int) -> Callable[[Tensor, Call], Any]:
        return lambda h, _: _wrap(hidden if k == len(blocks) - 1 else h, as_tuple)

    with torch.no_grad(), _replaced(blocks, note):
        logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits


def _pass(
    model: nn.Module, path: str, batch: Tensor, change: Callable[[Tensor], Tensor], as_tuple: bool
) -> list[tuple[Tensor, Call]]:
    """One forward with recorders. Each block must be called once, in order, on exactly what the one before returned."""
    blocks = _module_list(model, path)
    seen: list[tuple[Tensor, Call]] = []
    given: list[Tensor] = []

    def note(k: int) -> Callable[[Tensor, Call], Any]:
        def record(hidden: Tensor, call: Call) -> Any:
            if k != len(seen):
                raise InputError(
                    f"{type(model).__name__} calls its block {k} out of order; it cannot be replayed block by block."
                )
            if k > 0 and hidden is not given[-1]:
                raise _NotChained(k)
            seen.append((hidden, call))
            given.append(change(hidden))
            return _wrap(given[-1], as_tuple)

        return record

    with torch.no_grad(), _replaced(blocks, note):
        output = _base(model, path)(input_ids=batch, use_cache=False)
    last = output if isinstance(output, Tensor) else output[0]  # hidden state or, where there is no base model, logits
    if not isinstance(last, Tensor) or last.shape[:2] != batch.shape:
        raise _NotChained(len(blocks))
    if len(seen) != len(blocks):
        raise InputError(
            f"{type(model).__name__} calls {len(seen)} of its {len(blocks)} blocks; it cannot be replayed "
            "block by block."
        )
    return seen


class _NotChained(BitfloorError):
    """A block did not receive what the one before it returned."""

    def __init__(self, k: int) -> None:
        super().__init__(f"block {k} does not receive the output of block {k - 1}")
        self.k = k


def _probe(model: nn.Module, path: str, batch: Tensor) -> bool:
    """Whether blocks return tuples; refuses models whose blocks depend on each other beyond the hidden state.

    A short piece of one batch is enough: what is asked is how the model is wired, not what it computes.
    """
    piece = batch[:1, : min(batch.shape[1], 8)]
    name = type(model).__name__
    as_tuple = False
    try:
        plain = _pass(model, path, piece, lambda h: h, as_tuple)
    except (_NotChained, IndexError, TypeError, ValueError, RuntimeError) as problem:
        as_tuple = True
        try:
            plain = _pass(model, path, piece, lambda h: h, as_tuple)
        except (BitfloorError, AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            raise InputError(
                f"{name} does something between its blocks that cannot be replayed block by block ({problem})."
            ) from problem
    moved = _pass(model, path, piece, lambda h: h * 0.5 + 1.0, as_tuple)
    for k, ((_, a), (_, b)) in enumerate(zip(plain, moved, strict=True)):
        if not _same((a.args, a.kwargs), (b.args, b.kwargs)):
            raise InputError(
                f"the arguments of block {k} of {name} depend on earlier blocks; it cannot be replayed block by block."
            )
    return as_tuple


def _base(model: nn.Module, path: str) -> nn.Module:
    """The model without its head where there is one: logits over a vocabulary are not needed to see the blocks."""
    base = getattr(model, "base_model", model)
    blocks = _module_list(model, path)
    return base if any(m is blocks for m in base.modules()) else model


def _module_list(model: nn.Module, path: str) -> nn.ModuleList:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@contextmanager
def _replaced(blocks: nn.ModuleList, note: Callable[[int], Callable[[Tensor, Call], Any]]) -> Iterator[None]:
    originals = list(blocks)
    try:
        for k, block in enumerate(originals):
            blocks[k] = _Recorder(block, note(k))
        yield
    finally:
        for k, block in enumerate(originals):
            blocks[k] = block


def _wrap(hidden: Tensor, as_tuple: bool) -> Any:
    return (hidden,) if as_tuple else hidden


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Take the hidden state out of a call and refuse arguments that cannot be kept and given again."""
    slot: int | str | None = next((n for n in _HIDDEN_NAMES if isinstance(kwargs.get(n), Tensor)), None)
    if args and isinstance(args[0], Tensor):
        slot = 0
    if slot is None:
        raise InputError(
            "a block is called without a hidden state that bitfloor can recognise; the model is not supported."
        )
    hidden = args[0] if isinstance(slot, int) else kwargs[slot]
    rest = (
        Call((None, *args[1:]), dict(kwargs), 0) if isinstance(slot, int) else Call(args, {**kwargs, slot: None}, slot)
    )
    for label, value in [*((f"argument {i}", v) for i, v in enumerate(rest.args)), *rest.kwargs.items()]:
        _check(label, value)
    return hidden, rest


def _check(label: str, value: Any) -> None:
    if isinstance(value, (Tensor, *_PLAIN)):
        return
    if isinstance(value, tuple):
        for item in value:
            _check(label, item)
        return
    # A dict, a list or a cache is a thing one block can write to and the next one read.
    raise InputError(
        f"a block receives {label} of type {type(value).__name__}, through which blocks can pass data to each other; "
        "the model cannot be replayed block by block."
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return bool(a == b)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


class _Store:
    """Keeps one copy of equal tensors, so that a mask costs its size once and not once per block and batch."""

    def __init__(self) -> None:
        self._kinds: dict[Any, list[Tensor]] = {}

    def intern(self, call: Call) -> Call:
        return replace(call, args=self._value(call.args), kwargs={k: self._value(v) for k, v in call.kwargs.items()})

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._kinds.setdefault((value.shape, value.dtype, value.device), [])
            for other in known:
                if _equal(value, other):
                    return other
            known.append(value.detach())
            return known[-1]
        if type(value) is tuple:
            return tuple(self._value(v) for v in value)
        return value

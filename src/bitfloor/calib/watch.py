"""Seeing what each matrix of a block is multiplied with, while the block's own forward runs.

A linear layer is a module, so a hook in front of it sees its input. An expert is a slice of a stacked parameter and is
multiplied inside somebody else's forward; it is recognised by where the slice lies in memory: every product that runs
is looked at, and one whose weight is a view into a watched parameter tells the expert and its input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitfloor.core.errors import BitfloorError
from bitfloor.core.spec import MatrixRef

# Products an expert's forward may use: name -> (position of the input, position of the weight).
_PRODUCTS = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
}

Note = Callable[[str, Tensor], None]


class Finished(Exception):
    """Raised inside a forward to end it early; no error: it has shown all that was asked for."""


class Watcher:
    """Watches the matrices of one block during one forward.

    Args:
        module: the block.
        refs: local parameter path (from the block) and description of each matrix to watch.
        note: called as ``note(name, input)`` with the input as the model has it, at every use.
    """

    def __init__(self, module: nn.Module, refs: Sequence[tuple[str, MatrixRef]], note: Note) -> None:
        self._module = module
        self._note = note
        self._linears = [(local, ref) for local, ref in refs if ref.kind != "expert"]
        self._experts: dict[str, dict[int, MatrixRef]] = {}
        for local, ref in refs:
            if ref.kind == "expert":
                assert ref.index is not None
                self._experts.setdefault(local, {})[ref.index] = ref
        self.counts: Counter[str] = Counter()
        self.owner_calls: Counter[str] = Counter()
        self._pending: set[str] | None = None

    @contextmanager
    def running(self, replaced: Mapping[str, Tensor], stop_after: set[str] | None = None) -> Iterator[None]:
        """Watch whatever runs inside.

        Args:
            replaced: local parameter path -> the tensor used in its place during this forward.
            stop_after: end the forward (silently) once all these names were seen; an expert counts as seen when the
                module that holds it is done, since an expert without tokens is never used. None = run to the end.
        """
        self._pending = None if stop_after is None else set(stop_after)
        handles = []
        for local, ref in self._linears:
            owner = self._module.get_submodule(local.rpartition(".")[0])
            handles.append(owner.register_forward_pre_hook(self._linear_hook(ref.name), with_kwargs=True))
        stacks = []
        for local, experts in self._experts.items():
            owner = self._module.get_submodule(local.rpartition(".")[0])
            handles.append(owner.register_forward_hook(self._owner_hook(local, [r.name for r in experts.values()])))
            stacks.append((replaced.get(local, self._module.get_parameter(local)), experts))
        try:
            if stacks:
                with _ProductMode(stacks, self._see):
                    yield
            else:
                yield
        except Finished:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def check_experts(self) -> None:
        """Refuse a block whose experts ran without any of their products being recognised.

        Raises:
            BitfloorError: naming the parameter.
        """
        for local, experts in self._experts.items():
            if self.owner_calls[local] and not any(self.counts[ref.name] for ref in experts.values()):
                raise BitfloorError(
                    f"the experts in {next(iter(experts.values())).param} were used in a way bitfloor "
                    "cannot see, so their "
                    "inputs are unknown; this model can only be quantized with a recipe that needs no activations."
                )

    def _linear_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(name, args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor)))
            self._done([name])

        return hook

    def _owner_hook(self, local: str, names: list[str]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.owner_calls[local] += 1
            self._done(names)

        return hook

    def _see(self, name: str, x: Tensor) -> None:
        self.counts[name] += 1
        self._note(name, x)

    def _done(self, names: list[str]) -> None:
        if self._pending is not None:
            self._pending.difference_update(names)
            if not self._pending:
                raise Finished


class _ProductMode(TorchFunctionMode):
    """Looks at every product and reports those with a slice of a watched stack."""

    def __init__(self, stacks: list[tuple[Tensor, dict[int, MatrixRef]]], see: Note) -> None:
        super().__init__()
        self._stacks = {stack.untyped_storage().data_ptr(): (stack, experts) for stack, experts in stacks}
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = _PRODUCTS.get(getattr(func, "__name__", ""))
        if places is not None:
            operands = [*args, *(kwargs or {}).values()]
            if len(operands) > places[1] and isinstance(operands[places[1]], Tensor):
                self._look(operands[places[0]], operands[places[1]])
        return func(*args, **(kwargs or {}))

    def _look(self, x: Tensor, weight: Tensor) -> None:
        found = self._stacks.get(weight.untyped_storage().data_ptr())
        if found is None:
            return
        stack, experts = found
        first, rest = divmod(int(weight.storage_offset() - stack.storage_offset()), stack.stride(0))
        many = weight.dim() == 3
        for i in range(weight.shape[0] if many else 1):
            ref = experts.get(first + i)
            piece = x[i] if many else x
            if rest or ref is None:
                continue
            if piece.shape[-1] != ref.shape[1]:
                raise BitfloorError(
                    f"{ref.name} has {ref.shape[1]} inputs but is multiplied with {piece.shape[-1]}; its "
                    "layout is not known."
                )
            if many:  # every expert is given every token; the ones it was not chosen for are zeroed
                flat = piece.reshape(-1, piece.shape[-1])
                piece = flat[flat.any(dim=-1)]
            if piece.numel():
                self._see(ref.name, piece)


def same_input_key(x: Tensor) -> tuple[Any, ...]:
    """Equal for two inputs exactly if they are the same data, as long as both tensors are kept alive.

    A pointer alone would not do: memory that was freed is used again. The version tells a tensor changed in place.
    """
    version = 0 if torch.is_inference(x) else x._version
    return (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1], x.stride()[-1:], version)

"""One decoder block as something to run, look into, and run again with other weights. The module is never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitfloor.calib.capture import Call
from bitfloor.calib.watch import Watcher, same_input_key
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.spec import MatrixRef

Groups = list[tuple[str, ...]]


class Prepared(dict[str, Tensor]):
    """Overrides turned into parameters once, for many forwards; made by `BlockRunner.prepare`."""


class BlockRunner:
    """An untouched decoder block with the call arguments captured for it.

    Args:
        module: the block, weights loaded, eval mode.
        prefix: its path from the model root, ``"model.layers.3"``.
        refs: its quantizable matrices.
        calls: its captured arguments, one per batch.
        products: type in which the quantizable matrices are multiplied. Other modules with a matrix (a router) are
            computed in float32, and so are sums, softmax and the residual stream.

    Attributes:
        names: public names of the matrices, in module order.
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        refs: Sequence[MatrixRef],
        calls: Sequence[Call],
        products: torch.dtype = torch.float32,
    ) -> None:
        self.module = module
        self.prefix = prefix
        self.products = products
        self.names = [ref.name for ref in refs]
        self._refs = {ref.name: ref for ref in refs}
        self._local = {ref.name: ref.param.removeprefix(f"{prefix}.") for ref in refs}
        self._stacks = _whole_stacks(module, refs, self._local)
        self._calls = calls
        self._once: set[str] | None = None
        found: list[Any] = [getattr(part, "config", None) for part in module.modules()]
        own = {id(module.get_parameter(local)) for local in self._local.values()}
        self._others = [
            part
            for part in module.modules()
            if any(value.dim() > 1 for value in part.parameters(recurse=False))
            and not any(id(value) in own for value in part.parameters())
        ]
        self._configs = list({id(c): c for c in found if hasattr(c, "_experts_implementation")}.values())

    def ref(self, name: str) -> MatrixRef:
        """Description of one matrix.

        Raises:
            BitfloorError: the block has no such matrix.
        """
        if name not in self._refs:
            has = ", ".join(self.names[:4])
            raise BitfloorError(f"{name} is no quantizable matrix of this block; it has {has}, ...")
        return self._refs[name]

    def weight(self, name: str) -> Tensor:
        """The float weight as float32 ``[O, I]``: a view of the parameter wherever it already is float32.

        Of a stack, see `stacks`, all matrices row below row.
        """
        if name in self._stacks:
            first = self._refs[self._stacks[name][0]]
            whole = self.module.get_parameter(self._local[first.name]).detach()
            return (whole.transpose(1, 2) if first.transposed else whole).reshape(-1, first.shape[1]).float()
        ref = self.ref(name)
        tensor = self.module.get_parameter(self._local[name]).detach()
        tensor = tensor if ref.index is None else tensor[ref.index]
        return (tensor.t() if ref.transposed else tensor).float()

    def forward(self, x: Tensor, batch: int, overrides: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the block.

        Gradients flow to ``x`` and ``overrides`` unless the caller turns them off.

        Args:
            x: hidden states ``[B, T, D]``; moved to the block's device.
            batch: which captured arguments to use.
            overrides: public name -> weight ``[O, I]`` to use instead of the block's own, or what `prepare` made of it.

        Returns:
            hidden states ``[B, T, D]``.

        Raises:
            BitfloorError: an unknown name, a wrong shape, or a block that returns no hidden state.
        """
        return self._run(x, batch, self._replacements(overrides or {}))

    def prepare(self, overrides: Mapping[str, Tensor]) -> Prepared:
        """Turn overrides into parameters once; the result can be given wherever overrides are taken.

        Worth it where experts are overridden: putting 128 of them back into their stack copies gigabytes each time.
        Later changes of the override tensors are not seen where a copy had to be made.
        """
        return self._replacements(overrides)

    def observe(
        self,
        xs: Iterable[Tensor],
        fn: Callable[[str, Tensor], None],
        names: Iterable[str],
        overrides: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Show the inputs of some matrices, batch by batch, without gradients.

        Each forward ends as soon as everything asked for was seen. Matrices used more than once in a forward are
        shown at every use; experts are shown the tokens routed to them, and not at all when there are none.

        Args:
            xs: the block's inputs, batch ``i`` for captured call ``i``.
            fn: called as ``fn(name, rows)`` with rows ``[N, I]``; rows must not be changed.
            names: matrices to look at. Those of one input group see the same rows at their first use: asking for
                one of them is enough.
            overrides: weights to run with, see `forward`.
        """
        wanted = {self.ref(name).name for name in names}
        if not wanted:
            return
        replaced = self._replacements(overrides or {})
        with torch.no_grad():
            for batch, x in enumerate(xs):
                self._look(x, batch, fn, wanted, replaced)
        trim_heap()

    def observe_pairs(
        self,
        exact: Iterable[Tensor],
        xs: Iterable[Tensor],
        fn: Callable[[str, Tensor, Tensor], None],
        names: Iterable[str],
        overrides: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Show what enters some matrices for two versions of the block's input, row by row the same token.

        A matrix that is shown only some of the tokens (an expert) may be shown others in the other version: its rows
        cannot be paired, and it is shown the second version twice.

        Args:
            exact: the block's inputs in the float model; run with the block's own weights.
            xs: its inputs in the quantized model; run with ``overrides``.
            fn: called as ``fn(name, exact_rows, rows)``, both ``[N, I]``; not to be changed.
            names: matrices to look at, as in `observe`.
            overrides: weights to run ``xs`` with.
        """
        wanted = {self.ref(name).name for name in names}
        dense = {name for name in wanted if self._refs[name].kind != "expert"}
        if not wanted:
            return
        replaced = self._replacements(overrides or {})
        with torch.no_grad():
            for batch, (before, x) in enumerate(zip(exact, xs, strict=True)):
                held: dict[str, list[Tensor]] = {name: [] for name in dense}

                def hold(name: str, x: Tensor, held: dict[str, list[Tensor]] = held) -> None:
                    held[name].append(x.clone())  # the block may reuse this memory while it runs on

                if dense:
                    self._look(before, batch, hold, dense, {})
                for uses in held.values():
                    uses.reverse()
                tokens = x.shape[:-1].numel()

                def pair(name: str, x: Tensor, held: dict[str, list[Tensor]] = held, tokens: int = tokens) -> None:
                    uses = held.get(name)
                    other = uses.pop() if uses else x
                    fn(name, other if other.shape == x.shape and len(x) == tokens else x, x)

                self._look(x, batch, pair, wanted, replaced)
        trim_heap()

    def owner(self, name: str) -> nn.Module:
        """The module that has the parameter of a matrix."""
        self.ref(name)
        return self.module.get_submodule(self._local[name].rpartition(".")[0])

    def _look(
        self, x: Tensor, batch: int, fn: Callable[[str, Tensor], None], wanted: set[str], replaced: Mapping[str, Tensor]
    ) -> None:
        """Show the inputs of the wanted matrices in one forward, which ends as soon as all were seen."""

        def note(name: str, x: Tensor) -> None:
            if name in wanted:
                fn(name, x.detach().reshape(-1, x.shape[-1]))

        if self._once is None:
            self._watch_all(x, batch, note, replaced)
            return
        watcher = Watcher(self.module, [(self._local[n], self._refs[n]) for n in self.names if n in wanted], note)
        with watcher.running(replaced, wanted if wanted <= self._once else None):
            self._run(x, batch, replaced)

    def input_groups(self, x: Tensor, batch: int = 0) -> Groups:
        """Matrices that are fed by the same tensor, found by running one batch with every input kept alive.

        Args:
            x: an input of the block ``[B, T, D]``.
            batch: which captured arguments to use.

        Returns:
            groups of public names in execution order; experts that saw no token come last, grouped as the others are.
        """
        groups: dict[tuple[Any, ...], list[str]] = {}
        alive: list[Tensor] = []
        seen: set[str] = set()

        def note(name: str, x: Tensor) -> None:
            if name not in seen:
                seen.add(name)
                alive.append(x)
                groups.setdefault(same_input_key(x), []).append(name)

        with torch.no_grad():
            self._watch_all(x, batch, note, {})
        found = [tuple(g) for g in groups.values()]
        return found + self._unseen(found, seen)

    def stages(self, groups: Groups) -> list[Groups]:
        """Merge groups that do not feed each other: one group of every expert, not the experts one after another.

        Quantizing stage by stage is as sequential as quantizing group by group, since no expert feeds another, and
        takes two passes for a layer of 128 experts instead of 256.

        Args:
            groups: as `input_groups` returned them.

        Returns:
            stages in execution order, each a list of groups.
        """
        stages: dict[Any, Groups] = {}
        for group in groups:
            same = all(self._refs[n].kind == "expert" for n in group)
            key = tuple(sorted({self._refs[n].param for n in group})) if same else group
            stages.setdefault(key, []).append(group)
        return list(stages.values())

    def stacks(self) -> Mapping[str, tuple[str, ...]]:
        """Experts that are one parameter, all of them and in order, by the name of that parameter.

        The name is understood wherever the name of a matrix is overridden and by `weight`: it means all experts as one
        matrix, row below row.
        """
        return self._stacks

    def _unseen(self, found: Groups, seen: set[str]) -> Groups:
        twin = {}
        for group in found:
            for name in group:
                twin[self._refs[name].param] = tuple(self._refs[n].param for n in group)
        rest: dict[Any, list[str]] = {}
        for name in (n for n in self.names if n not in seen):
            ref = self._refs[name]
            key = (twin.get(ref.param, ref.param), ref.index) if ref.kind == "expert" else name
            rest.setdefault(key, []).append(name)
        return [tuple(g) for g in rest.values()]

    def _watch_all(
        self, x: Tensor, batch: int, note: Callable[[str, Tensor], None], replaced: Mapping[str, Tensor]
    ) -> None:
        """A full forward that also learns which matrices are used exactly once: for these it may be cut short."""
        watcher = Watcher(self.module, [(self._local[n], self._refs[n]) for n in self.names], note)
        with watcher.running(replaced):
            self._run(x, batch, replaced)
        watcher.check_experts()
        self._once = set()
        for name, ref in self._refs.items():
            uses = watcher.owner_calls[self._local[name]] if ref.kind == "expert" else watcher.counts[name]
            if uses == 1:
                self._once.add(name)

    def _run(self, x: Tensor, batch: int, replaced: Mapping[str, Tensor]) -> Tensor:
        device = next(self.module.parameters()).device
        args, kwargs = self._calls[batch].bind(x.to(device))
        with self._one_by_one(), self._mixed(device.type):
            output = (
                functional_call(self.module, dict(replaced), args, kwargs) if replaced else self.module(*args, **kwargs)
            )
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(hidden, Tensor) or hidden.shape != x.shape:
            raise BitfloorError(
                f"a {type(self.module).__name__} returned {type(hidden).__name__}, not a hidden state like its input."
            )
        return hidden.float()

    def _replacements(self, overrides: Mapping[str, Tensor]) -> Prepared:
        """Overrides as the parameters they live in: transposed where stored so, experts put back into their stack."""
        if isinstance(overrides, Prepared):
            return overrides
        made = Prepared()
        stacks: dict[str, dict[int, Tensor]] = {}
        for name, weight in overrides.items():
            if name in self._stacks:
                first = self.ref(self._stacks[name][0])
                whole = weight.view(len(self._stacks[name]), *first.shape)
                stored = whole.transpose(1, 2).contiguous() if first.transposed else whole
                made[self._local[first.name]] = stored.to(self.module.get_parameter(self._local[first.name]).dtype)
                continue
            ref = self.ref(name)
            if tuple(weight.shape) != ref.shape:
                raise BitfloorError(
                    f"the override of {name} has shape {list(weight.shape)}, but the matrix is {list(ref.shape)}."
                )
            # Contiguous, so that the product is the very one the model would run with this weight copied in.
            stored = weight.t().contiguous() if ref.transposed else weight
            if ref.index is None:
                made[self._local[name]] = stored
            else:
                stacks.setdefault(self._local[name], {})[ref.index] = stored
        for local, parts in stacks.items():
            own = self.module.get_parameter(local)
            made[local] = torch.stack([parts[e].to(own.dtype) if e in parts else own[e] for e in range(own.shape[0])])
        return made

    @contextmanager
    def _mixed(self, device: str) -> Iterator[None]:
        """Products in their type, except in modules with other matrices: a router decides by small differences."""
        if self.products is torch.float32:
            yield
            return

        def exact(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with torch.autocast(device, enabled=False):
                    return forward(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})

            return run

        try:
            for part in self._others:
                part.forward = exact(part.forward)
            with torch.autocast(device, self.products):
                yield
        finally:
            for part in self._others:
                part.__dict__.pop("forward", None)

    @contextmanager
    def _one_by_one(self) -> Iterator[None]:
        """Experts run in transformers' plain loop, the only way in which each expert's product can be seen."""
        before = [c._experts_implementation for c in self._configs]
        try:
            for config, value in zip(self._configs, before, strict=True):
                if value != "eager":
                    config._experts_implementation = "eager"
            yield
        finally:
            for config, value in zip(self._configs, before, strict=True):
                if value != "eager":
                    config._experts_implementation = value


def _whole_stacks(module: nn.Module, refs: Sequence[MatrixRef], local: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[MatrixRef]] = {}
    for ref in refs:
        if ref.index is not None:
            found.setdefault(ref.param, []).append(ref)
    whole = {
        param: sorted(parts, key=lambda ref: ref.index or 0)
        for param, parts in found.items()
        if len(parts) == len(module.get_parameter(local[parts[0].name]))
    }
    return {param: tuple(ref.name for ref in parts) for param, parts in whole.items()}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

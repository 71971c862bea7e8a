"""A decoder block small enough to check by hand, speaking the protocol that methods use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Groups = list[tuple[str, ...]]


class ToyBlock:
    """``out = x + relu(x A^T) C^T + x B^T``, or the same with ``C`` fed by experts.

    ``a`` and ``b`` read the same tensor, ``c`` what ``a`` made of it. With ``experts``, every expert ``e`` has its own
    ``up.e`` and ``down.e`` beside them, and ``routes[t]`` names the expert of token ``t``.

    Args:
        width: ``D``.
        hidden: rows of ``a``.
        seed: of the random weights.
        routes: expert of each token of a batch; empty for a block without experts.
        experts: number of experts.
    """

    def __init__(
        self, width: int = 24, hidden: int = 40, seed: int = 0, routes: list[int] | None = None, experts: int = 0
    ):
        self.products = torch.float32
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

        self.weights = {"a": matrix(hidden, width), "b": matrix(width, width), "c": matrix(width, hidden)}
        for expert in range(experts):
            self.weights[f"up.{expert}"] = matrix(hidden, width)
            self.weights[f"down.{expert}"] = matrix(width, hidden)
        self.experts = experts
        self.routes = torch.tensor(routes or [], dtype=torch.int64)
        self.passes = 0

    def weight(self, name: str) -> Tensor:
        return self.weights[name]

    def forward(self, x: Tensor, batch: int, overrides: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._run(x, lambda name, rows: None, overrides or {})

    def observe(
        self,
        xs: Iterable[Tensor],
        fn: Callable[[str, Tensor], None],
        names: Iterable[str],
        overrides: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.passes += 1
        wanted = set(names)
        for x in xs:
            self._run(x, lambda name, rows: fn(name, rows) if name in wanted else None, overrides or {})

    def observe_pairs(
        self,
        exact: Iterable[Tensor],
        xs: Iterable[Tensor],
        fn: Callable[[str, Tensor, Tensor], None],
        names: Iterable[str],
        overrides: Mapping[str, Tensor] | None = None,
    ) -> None:
        wanted = set(names)
        for one, other in zip(exact, xs, strict=True):
            held: dict[str, Tensor] = {}
            self.observe([one], held.__setitem__, wanted)
            self.observe([other], lambda name, x, held=held: fn(name, held[name], x), wanted, overrides)

    def input_groups(self, x: Tensor, batch: int = 0) -> Groups:
        return [("a", "b"), ("c",), *((f"{part}.{e}",) for e in range(self.experts) for part in ("up", "down"))]

    def stages(self, groups: Groups) -> list[Groups]:
        merged: dict[str, Groups] = {}
        for group in groups:
            merged.setdefault(group[0].split(".")[0], []).append(group)
        return list(merged.values())

    def stacks(self) -> dict[str, tuple[str, ...]]:
        return {}

    def _run(self, x: Tensor, note: Callable[[str, Tensor], None], overrides: Mapping[str, Tensor]) -> Tensor:
        def apply(name: str, rows: Tensor) -> Tensor:
            note(name, rows)
            return rows @ overrides.get(name, self.weights[name]).T

        flat = x.reshape(-1, x.shape[-1])
        out = flat + apply("b", flat)
        out = out + apply("c", apply("a", flat).relu())
        for expert in range(self.experts):
            chosen = (self.routes == expert).repeat(x.shape[0])
            if bool(chosen.any()):
                out[chosen] += apply(f"down.{expert}", apply(f"up.{expert}", flat[chosen]).relu())
        return out.reshape(x.shape)


def outputs(block: ToyBlock, inputs: list[Tensor]) -> list[Tensor]:
    """What the float block makes of inputs, batch by batch."""
    return [block.forward(x, 0) for x in inputs]


def batches(count: int = 3, sequences: int = 2, tokens: int = 30, width: int = 24, seed: int = 1) -> list[Tensor]:
    """Inputs ``[B, T, D]`` with correlated channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + 0.5 * torch.eye(width)
    size = torch.randn(width, generator=generator).exp()
    return [torch.randn(sequences, tokens, width, generator=generator) @ mix * size for _ in range(count)]

"""Whether a block uses its linear layers in the one way that a packed one knows: by calling them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitfloor.calib.block import BlockRunner
from bitfloor.core.errors import BitfloorError

APART = 1e-3  # of the largest output: more than sums in another order make


def check_called(runner: BlockRunner, names: Iterable[str], x: Tensor, batch: int = 0) -> None:
    """Refuse a layer whose weight the block reads itself, called or not: packed, it has none.

    The block runs once more with weights that are there during the layers' own calls and are not a number otherwise.
    A layer that is not used at all (cross-attention without images) is let be. What is read for a choice alone is found
    only if the choice changes.

    Args:
        runner: the block.
        names: matrices that will be packed; experts, which have calls of another kind, are not looked at.
        x: an input of the block ``[B, T, D]``, for the captured call ``batch``.

    Raises:
        BitfloorError: naming the matrix.
    """
    layers = {name: runner.owner(name) for name in names if runner.ref(name).kind != "expert"}
    with torch.no_grad():
        exact = runner.forward(x, batch)

        def unmoved(some: Sequence[nn.Module]) -> bool:
            with _only_called(list({id(layer): layer for layer in some}.values())):
                return _same(exact, runner.forward(x, batch))

        if unmoved(list(layers.values())):
            return
        name = next((name for name, layer in layers.items() if not unmoved([layer])), next(iter(layers)))
    local = name.removeprefix(runner.prefix).lstrip(".")
    raise BitfloorError(
        f"a {type(runner.module).__name__} reads the weight of {name} itself, and a packed matrix has none to read; "
        f"begin anew (--no-resume) with the rule {{match: '*.{local}', keep: true}} under layers, which keeps it."
    )


@contextmanager
def _only_called(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Weights that only the layers' own forwards see."""
    before = [(layer, layer._parameters["weight"], layer.__dict__.get("forward")) for layer in layers]
    for layer, weight, _ in before:
        assert weight is not None
        nothing = torch.full((), math.nan, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        layer._parameters["weight"] = absent = nn.Parameter(nothing, requires_grad=False)
        layer.forward = _with_weight(layer, weight, absent)
    try:
        yield
    finally:
        for layer, weight, own in before:
            layer._parameters["weight"] = weight
            del layer.forward
            if own is not None:
                layer.forward = own


def _with_weight(layer: nn.Module, weight: nn.Parameter, absent: nn.Parameter) -> Callable[..., Any]:
    plain = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        layer._parameters["weight"] = weight
        try:
            return plain(*args, **kwargs)
        finally:
            layer._parameters["weight"] = absent

    return forward


def _same(exact: Tensor, found: Tensor) -> bool:
    sound = torch.isfinite(exact)
    apart = torch.where(sound, (found - exact).abs(), torch.zeros_like(exact))
    most = torch.where(sound, exact.abs(), torch.zeros_like(exact)).amax()
    return bool((apart <= APART * most).all())  # not a number is not

"""The packed kernels of GPUs (``ops/triton``): whether they are there, and why not.

Triton comes with torch's builds for GPUs. What the kernels compute is defined by :mod:`bitfloor.ops.packed_reference`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from bitfloor.ops import packed_reference
from bitfloor.ops.backend import FLOAT
from bitfloor.ops.form import Form, read_form

LEAST_CAPABILITY = (8, 0)
NEAR = 1e-3  # of the largest output


class PackedGPU(Protocol):
    """What the operators need; see :class:`bitfloor.ops.triton.packed.PackedTriton`."""

    def linear(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool) -> Tensor: ...

    def stored_input(self, x: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor: ...

    def product(
        self, stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool
    ) -> Tensor: ...

    def embedding(self, ids: Tensor, parts: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor: ...

    def gradient(self, grad: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor: ...


@dataclass(frozen=True)
class Loaded:
    """What came of loading the kernels.

    Args:
        library: None if they are not used.
        reason: why they are not used, a clause; empty if they are.
    """

    library: PackedGPU | None
    reason: str = ""


@cache
def load() -> Loaded:
    """The kernels, once they have multiplied a small matrix right on the first GPU."""
    if not torch.cuda.is_available():
        return Loaded(None, "torch finds no GPU")
    if torch.version.hip:
        return Loaded(None, "they are written for NVIDIA's GPUs")
    least = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if least < LEAST_CAPABILITY:
        return Loaded(None, f"they need compute capability 8.0, and a GPU here has {least[0]}.{least[1]}")
    try:
        from bitfloor.ops.triton.packed import PackedTriton
    except ImportError as error:
        return Loaded(None, f"Triton cannot be imported ({error}); pip install triton")
    library = PackedTriton()
    try:
        found, wanted = _tried(library)
    except Exception as error:  # whatever a compiler, a driver or a GPU may come up with
        what = (str(error).splitlines() or [""])[0]
        return Loaded(None, f"Triton cannot run them here ({type(error).__name__}: {what})")
    if not float((found - wanted).abs().max()) <= NEAR * float(wanted.abs().max()):
        return Loaded(None, "what they compute on this GPU is wrong; please report it")
    return Loaded(library)


def library() -> PackedGPU | None:
    """The kernels, or None; then it is said once that torch computes."""
    found = load()
    if found.library is None:
        _say(found.reason)
    return found.library


@cache
def _say(reason: str) -> None:
    warnings.warn(
        f"The packed kernels are not used on the GPU: {reason}. Weights are dequantized panel by panel with torch.",
        stacklevel=2,
    )


def _tried(library: PackedGPU) -> tuple[Tensor, Tensor]:
    """A small product, and what it must be."""
    form = read_form((40, 96, 0, 0, 0, 0, 0, 96, 3, 32, 0, 0, 0))
    shapes = form.parts.values()
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randint(0, 256, shape, generator=generator, dtype=dtype)
        if dtype == torch.uint8
        else torch.rand(shape, generator=generator).to(dtype)
        for dtype, shape in shapes
    ]
    x = torch.randn(1, 96, generator=generator)
    found = library.linear(x.cuda(), [part.cuda() for part in parts], None, form, False)
    return found.cpu(), packed_reference.linear(x, parts, None, form, FLOAT)

"""What a storage format of a packed matrix offers. Codecs are stateless: modules of functions will do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from bitfloor.core.packed import PackedWeight

Layout = dict[str, Any]
Get = Callable[[str], Tensor]


class Codec(Protocol):
    """Turns packed matrices into named tensors and back.

    Law: ``dequantize(decode(name, layout(w), encode(name, w).__getitem__)) == dequantize(w)``, bit for bit.
    """

    def reject(self, weight: PackedWeight) -> str | None:
        """Why this format cannot hold ``weight``, or None if it can."""
        ...

    def layout(self, weight: PackedWeight) -> Layout:
        """Everything but the tensors, as JSON: what ``decode`` needs to know."""
        ...

    def encode(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The tensors to store for the matrix ``name``."""
        ...

    def decode(self, name: str, layout: Layout, get: Get) -> PackedWeight:
        """The packed matrix again; ``get`` returns a stored tensor by its full name."""
        ...

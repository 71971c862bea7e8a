"""The columns in which a matrix is rounded: its input channels, in another order if need be, and rotated.

    y = x w^T = (x P R) stored^T        w P R = stored        w = stored R P^T

``P`` puts the channels into an order (column ``j`` of ``x P`` is channel ``channels[j]`` of ``x``), ``R`` is the
rotation of :mod:`bitfloor.core.rotation`. Channels that matter alike then share groups, and so blocks of the rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitfloor.core.channels import pack_order, unpack_order
from bitfloor.core.rotation import rotate, rotate_both
from bitfloor.core.spec import QuantSpec


@dataclass(frozen=True)
class Basis:
    """An order of the input channels and a rotation behind it.

    Args:
        channels: input channel of every column, a permutation, as bytes (:mod:`bitfloor.core.channels`); empty for
            natural order.
        rotation: block size of the rotation, 0 for none.
    """

    channels: bytes = b""
    rotation: int = 0

    def __bool__(self) -> bool:
        return bool(self.channels or self.rotation)

    def to(self, x: Tensor) -> Tensor:
        """``x P R`` along the last dimension ``[..., I]``."""
        return rotate(ordered(x, self._index(x)), self.rotation)

    def back(self, stored: Tensor) -> Tensor:
        """``stored R P^T``: the inverse of :meth:`to`."""
        return restored(rotate(stored, self.rotation), self._index(stored))

    def both(self, matrix: Tensor) -> Tensor:
        """``R P^T matrix P R`` for ``matrix [I, I]``: what ``X^T Y`` is for inputs in this basis."""
        index = self._index(matrix)
        if index is not None:
            matrix = matrix.index_select(0, index).index_select(1, index)
        return rotate_both(matrix, self.rotation)

    def _index(self, like: Tensor) -> Tensor | None:
        return _index(self.channels, like.device) if self.channels else None


def basis_of(spec: QuantSpec) -> Basis:
    """The basis that a storage asks for."""
    return Basis(spec.channels, spec.rotation)


def ordered(x: Tensor, channels: Tensor | None) -> Tensor:
    """``x P``: column ``j`` of the result is channel ``channels[j]`` of ``x [..., I]``; None leaves it as it is."""
    return x if channels is None else x.index_select(-1, channels)


def restored(x: Tensor, channels: Tensor | None) -> Tensor:
    """``x P^T``: the inverse of :func:`ordered`."""
    if channels is None:
        return x
    out = torch.zeros_like(x)
    out[..., channels] = x
    return out


def by_size(values: Tensor) -> bytes:
    """The order of channels by falling values ``[I]``."""
    return pack_order(torch.argsort(values, descending=True, stable=True).tolist())


@lru_cache(maxsize=64)
def _index(channels: bytes, device: torch.device) -> Tensor:
    # It is kept for all callers, whatever the mode of the first.
    with torch.inference_mode(False):
        return torch.tensor(unpack_order(channels), dtype=torch.int64, device=device)

"""An order of input channels as bytes: two or four a channel, where a tuple of Python's numbers takes forty.

The first byte says which, ``H`` (16 bits) or ``I`` (32 bits), little endian; the rest is the order. No torch.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

NONE = b""  # natural order


def pack_order(channels: Sequence[int]) -> bytes:
    """The bytes of an order; none for none."""
    if not channels:
        return NONE
    kind = "H" if max(channels) < 1 << 16 else "I"
    return kind.encode() + _little(array(kind, channels)).tobytes()


def unpack_order(data: bytes) -> array[int]:
    """The order behind the bytes.

    Raises:
        ValueError: not bytes of an order.
    """
    if not data:
        return array("H")
    kind = data[:1].decode("latin-1")
    if kind not in ("H", "I"):
        raise ValueError("not an order of channels")
    found: array[int] = array(kind)
    found.frombytes(data[1:])
    return _little(found)


def is_order(channels: Sequence[int], columns: int) -> bool:
    """Whether every one of the columns occurs once."""
    return len(channels) == columns and sorted(channels) == list(range(columns))


def _little(values: array[int]) -> array[int]:
    if sys.byteorder == "big":
        values.byteswap()
    return values

"""Give freed memory back to the system, where the C library has to be asked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _find_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None
    return trim


_TRIM = _find_trim()


def trim_heap() -> None:
    """Return free heap pages to the system; a no-op where the C library has no ``malloc_trim``.

    Without it resident memory grows with every block although no tensor is kept: glibc cannot refit aligned blocks of
    the same size into the holes they left (SmolLM2-135M: 10 MB a block, 250 MB over the model). The call takes 0.1 ms.
    """
    if _TRIM is not None:
        _TRIM(0)

"""Make peak memory a property of the run instead of the heap's luck, where the C library is glibc."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

MAPPED_FROM = 4 << 20
"""Bytes from which a tensor is a mapping of its own."""
KEPT_ON_TOP = 64 << 20
"""Free bytes at the end of the heap that are kept for what comes next."""
OWN_SETTINGS = frozenset({"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"})
"""Variables with which a user says how glibc shall do it."""


def steady_allocation(environment: Mapping[str, str] = os.environ) -> bool:
    """Have large tensors mapped one by one, so that freeing one returns its pages at once.

    glibc does not refit an aligned tensor into the hole that one of the same size has left, and raises its threshold
    for mappings to 32 MiB as soon as one is freed. A run then leaves a growing heap of holes behind it, and its peak
    depends on luck. With a fixed threshold the heap holds small things only and every block peaks alike. To be called
    before large tensors are made: a heap that has grown is searched first, whatever the threshold, and building a
    model's skeleton is enough to grow it.

    It costs some processor time (pages made anew). The setting holds for the process. Nothing is changed where the
    user has set glibc's own variables for this.

    Args:
        environment: of the process.

    Returns:
        whether the setting was made.
    """
    if OWN_SETTINGS & environment.keys() or "malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    # Setting either turns the moving threshold off; the other would fall back to 128 KiB.
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_THRESHOLD, MAPPED_FROM), (_M_TRIM_THRESHOLD, KEPT_ON_TOP))
    )

"""What multiplies packed weights: the kernels, their definition in torch, or the kernels with int8 activations.

``BITFLOOR_BACKEND`` says it for a process, :func:`reference` and :func:`int8` for a block of code:

    with reference():
        model(ids)

``auto``, the default, is float kernels where there are some for the device, and the definition elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from bitfloor.core.errors import InputError

SETTING = "BITFLOOR_BACKEND"
AUTO, REFERENCE, INT8 = "auto", "reference", "int8"
BACKENDS = (AUTO, REFERENCE, INT8)
FLOAT = "float"  # of activations
ACTIVATIONS = (FLOAT, INT8)

_chosen: ContextVar[str | None] = ContextVar("bitfloor_backend", default=None)


def backend() -> str:
    """The backend of this moment.

    Raises:
        InputError: ``BITFLOOR_BACKEND`` has a value without a meaning.
    """
    return _chosen.get() or of_process()


@cache
def of_process() -> str:
    """What the environment says; it is asked once, because asking takes as long as a small product.

    Raises:
        InputError: something without a meaning.
    """
    chosen = os.environ.get(SETTING) or AUTO
    if chosen not in BACKENDS:
        raise InputError(f"{SETTING}={chosen} is not known; set it to one of {', '.join(BACKENDS)}, or not at all.")
    return chosen


def activations() -> str:
    """How packed modules round what they multiply: ``"float"`` not at all, ``"int8"`` block by block."""
    return INT8 if backend() == INT8 else FLOAT


@contextmanager
def choosing(name: str) -> Iterator[None]:
    """Inside, one of ``BACKENDS``, whatever the environment says."""
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def reference() -> Iterator[None]:
    """Inside, packed weights are multiplied by the definition in torch, whatever the environment says."""
    with choosing(REFERENCE):
        yield


@contextmanager
def int8() -> Iterator[None]:
    """Inside, packed modules round their inputs to int8, block by block: faster, and no longer exact."""
    with choosing(INT8):
        yield

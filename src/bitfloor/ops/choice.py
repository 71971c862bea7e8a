"""What a user asked to compute with, checked against what is there: ``--device``, ``--backend``, ``--activations``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from bitfloor.core.errors import InputError
from bitfloor.ops import packed_native, packed_triton
from bitfloor.ops.backend import ACTIVATIONS, AUTO, FLOAT, INT8, REFERENCE, SETTING, backend, choosing

CPU, TRITON = "cpu", "triton"
CHOICES = (AUTO, REFERENCE, CPU, TRITON)


def computing(
    name: str, activations: str | None = None, device: str = CPU
) -> Callable[[], AbstractContextManager[None]]:
    """What makes the context in which packed weights are multiplied as asked for; enter it around every step.

    Args:
        name: ``"auto"``: as ``BITFLOOR_BACKEND`` says, kernels where there are some by default; ``"reference"``: the
            definition in torch; ``"cpu"`` or ``"triton"``: those kernels and nothing in their place.
        activations: ``"float"``, or ``"int8"``: inputs rounded to int8, block by block; None: as ``BITFLOOR_BACKEND``
            says, float by default.
        device: where the model is.

    Raises:
        InputError: an unknown name, kernels that are not there, or int8 activations with the definition.
    """
    if name not in CHOICES:
        raise InputError(f"backend {name!r} is unknown; use one of {', '.join(CHOICES)}.")
    if activations is not None and activations not in ACTIVATIONS:
        raise InputError(f"activations {activations!r} are not known; use one of {', '.join(ACTIVATIONS)}.")
    if name == CPU:
        _check_cpu(device)
    if name == TRITON:
        _check_triton(device)
    base = backend() if name == AUTO else REFERENCE if name == REFERENCE else AUTO
    if activations == INT8 and base == REFERENCE:
        said = f"{SETTING}={REFERENCE}" if name == AUTO else f"the backend {REFERENCE}"
        raise InputError(f"{said} computes with float activations; leave out int8, or choose another backend.")
    chosen = INT8 if activations == INT8 else AUTO if activations == FLOAT and base == INT8 else base
    return lambda: choosing(chosen)


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        InputError: unknown, or no such accelerator.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown; use cpu or cuda.") from error
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported; use cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for but torch sees no CUDA device; use --device cpu.")


def multiplies_packed(device: str) -> bool:
    """Whether there are kernels for a device; elsewhere packed weights are unpacked panel by panel."""
    kind = torch.device(device).type
    if kind == CPU:
        return packed_native.load().library is not None
    return kind == "cuda" and packed_triton.load().library is not None


def _check_cpu(device: str) -> None:
    if torch.device(device).type != CPU:
        raise InputError(f"the backend {CPU} computes on the CPU and the device is {device}; use --device {CPU}.")
    if reason := packed_native.load().reason:
        raise InputError(f"the backend {CPU} is not there: {reason}; or use the backend {REFERENCE}.")


def _check_triton(device: str) -> None:
    if not torch.cuda.is_available():
        raise InputError(f"the backend {TRITON} needs a GPU and torch sees none; use {CPU} or {REFERENCE}.")
    if torch.device(device).type != "cuda":
        raise InputError(f"the backend {TRITON} computes on a GPU and the device is {device}; use --device cuda.")
    if reason := packed_triton.load().reason:
        raise InputError(f"the backend {TRITON} is not there: {reason}; or use the backend {REFERENCE}.")

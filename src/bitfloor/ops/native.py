"""The native library (``csrc/``): whether it is there, why not, and its functions for tensors.

The library is plain C behind :mod:`ctypes`, without any of Python's or torch's headers. It is optional: installing
builds it where there is a C++ compiler, and everything it computes has a definition in torch. It is used when it lies
in this folder, loads, and says the right number; otherwise :func:`loaded` has the reason.
``BITFLOOR_KERNELS=reference`` turns it off.

Rows are shared between as many threads as torch uses. They are Python threads (a call through ctypes holds no lock): a
second OpenMP runtime beside torch's own would be one too many. None is left running, so forks are safe.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bitfloor.core.errors import InputError

SETTING = "BITFLOOR_KERNELS"
REFERENCE = "reference"
FOLDER = Path(__file__).resolve().parent
ABI = 3  # of csrc/common.h: raised with every change of a signature or of a value
WORK_PER_THREAD = 1 << 18  # a thread costs what tens of thousands of operations do

POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
SIZES = (INTEGER,) * 5  # first row, one past the last, columns, group size, bits
SIGNATURES = {
    "bitfloor_fake_quantize": (*(POINTER,) * 5, *SIZES),
    "bitfloor_codes": (*(POINTER,) * 5, *SIZES),
    "bitfloor_sign_step": (*(POINTER,) * 5, ctypes.c_float, *(POINTER,) * 2, *SIZES),
    "bitfloor_gptq_columns": ((POINTER,) * 7 + (INTEGER,) * 4),
    "bitfloor_descend_columns": (*(POINTER,) * 6, ctypes.c_float, *(INTEGER,) * 4),
    "bitfloor_best_grid": (*(POINTER,) * 5, INTEGER, *(POINTER,) * 3, *(INTEGER,) * 5),
    "bitfloor_fit_sums": ((POINTER,) * 7 + (INTEGER,) * 4),
}


class Rounding(Protocol):
    """What learned rounding needs of a library: the passes that ``rounding_reference`` defines."""

    def fake_quantize(
        self, weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
    ) -> None: ...

    def codes(
        self, weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
    ) -> None: ...

    def sign_step(
        self,
        weight: Tensor,
        shift: Tensor | None,
        scale: Tensor,
        zero: Tensor,
        grad: Tensor,
        rate: float,
        bits: int,
        group_size: int,
    ) -> tuple[Tensor, Tensor]: ...


class Library:
    """The functions of the references beside it in native code, for dense tensors on the CPU.

    Args:
        library: a library whose number was checked.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        self._library = library

    def fake_quantize(
        self, weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
    ) -> None:
        """Write the fake-quantized weight to ``out`` ``[O, I]`` float32."""
        pointers = _pointers(weight, shift, scale, zero, out)

        def rows(first: int, last: int) -> None:
            self._library.bitfloor_fake_quantize(*pointers, first, last, weight.shape[1], group_size, bits)

        over_rows(rows, weight.shape[0], weight.numel())

    def codes(
        self, weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
    ) -> None:
        """Write the codes to ``out`` ``[O, I]`` uint8."""
        pointers = _pointers(weight, shift, scale, zero, out)

        def rows(first: int, last: int) -> None:
            self._library.bitfloor_codes(*pointers, first, last, weight.shape[1], group_size, bits)

        over_rows(rows, weight.shape[0], weight.numel())

    def sign_step(
        self,
        weight: Tensor,
        shift: Tensor | None,
        scale: Tensor,
        zero: Tensor,
        grad: Tensor,
        rate: float,
        bits: int,
        group_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Move ``shift`` in place, if there is one; returns ``towards`` and ``clipped`` ``[O, G]`` float32."""
        towards, clipped = torch.empty_like(scale), torch.empty_like(scale)
        pointers, sums = _pointers(weight, shift, scale, zero, grad), _pointers(towards, clipped)

        def rows(first: int, last: int) -> None:
            sizes = (first, last, weight.shape[1], group_size, bits)
            self._library.bitfloor_sign_step(*pointers, rate, *sums, *sizes)

        over_rows(rows, weight.shape[0], weight.numel())
        return towards, clipped

    def gptq_columns(
        self, work: Tensor, local: Tensor, scale: Tensor, shift: Tensor, tops: Tensor, codes: Tensor, errors: Tensor
    ) -> None:
        """Fix the columns ``work [n, O]``; writes ``codes`` and ``errors``."""
        pointers = _pointers(work, local, scale, shift, tops, codes, errors)

        def rows(first: int, last: int) -> None:
            self._library.bitfloor_gptq_columns(*pointers, first, last, *work.shape)

        over_rows(rows, work.shape[1], work.numel() * work.shape[0] // 2)

    def descend_columns(
        self, codes: Tensor, slope: Tensor, error: Tensor, local: Tensor, pivots: Tensor, scale: Tensor, top: float
    ) -> None:
        """Look at the columns ``codes [n, O]`` once, in place."""
        pointers = _pointers(codes, slope, error, local, pivots, scale)

        def rows(first: int, last: int) -> None:
            self._library.bitfloor_descend_columns(*pointers, top, first, last, *codes.shape)

        over_rows(rows, codes.shape[1], codes.numel() * codes.shape[0])

    def best_grid(
        self,
        weight: Tensor,
        importance: Tensor,
        tops: Tensor,
        candidates: tuple[Tensor, Tensor],
        best: tuple[Tensor, Tensor, Tensor],
        group_size: int,
    ) -> None:
        """Put candidates ``[C, O, G]`` in the place of the best so far where they are better."""
        given, found = _pointers(weight, importance, tops, *candidates), _pointers(*best)
        count, (height, width) = candidates[0].shape[0], weight.shape

        def rows(first: int, last: int) -> None:
            self._library.bitfloor_best_grid(*given, count, *found, first, last, height, width, group_size)

        over_rows(rows, height, weight.numel() * count)

    def fit_sums(
        self, weight: Tensor, importance: Tensor, tops: Tensor, scale: Tensor, zero: Tensor, group_size: int
    ) -> tuple[Tensor, Tensor]:
        """``above`` and ``below`` ``[O, G]`` float32."""
        above, below = torch.empty_like(scale), torch.empty_like(scale)
        pointers = _pointers(weight, importance, tops, scale, zero, above, below)

        def rows(first: int, last: int) -> None:
            self._library.bitfloor_fit_sums(*pointers, first, last, weight.shape[1], group_size)

        over_rows(rows, weight.shape[0], weight.numel())
        return above, below


@dataclass(frozen=True)
class Loaded:
    """What came of loading the library.

    Args:
        library: None if it is not used.
        reason: why it is not used, a clause; empty if it is.
    """

    library: Library | None
    reason: str = ""


def loaded() -> Loaded:
    """The library that this process uses, or why it uses none.

    Raises:
        InputError: ``BITFLOOR_KERNELS`` has a value without a meaning.
    """
    setting = os.environ.get(SETTING, "")
    if setting == REFERENCE:
        return Loaded(None, f"{SETTING}={REFERENCE} is set")
    if setting:
        raise InputError(f"{SETTING}={setting} is not known; set it to {REFERENCE}, or not at all.")
    return load(FOLDER)


def library_for(*tensors: Tensor | None) -> Library | None:
    """The library, if it is used and can take these tensors: dense ones on the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    return loaded().library if all(part.device.type == "cpu" and part.is_contiguous() for part in given) else None


def rounding_for(*tensors: Tensor | None) -> Rounding | None:
    """The library of learned rounding that can take these tensors: native on the CPU, Triton's on a GPU, if any."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(part.device.type == "cuda" and part.is_contiguous() for part in given):
        return library_for(*given)
    return None if os.environ.get(SETTING) == REFERENCE else _triton()


@cache
def _triton() -> Rounding | None:
    """None where Triton is not installed (it comes with torch's builds for GPUs), or cannot compile."""
    try:
        from bitfloor.ops.triton.rounding import TritonLibrary

        library, one = TritonLibrary(), torch.ones(1, 1, device="cuda")
        library.fake_quantize(one, None, one, one, 2, 1, torch.empty_like(one))
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError):
        return None
    return library


@cache
def load(folder: Path) -> Loaded:
    """Load the library from a folder, once."""
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").is_file()]
    if not paths:
        return Loaded(None, "it was not built; install bitfloor where there is a C++ compiler")
    again = f"install bitfloor again to replace {paths[0].name}"
    try:
        library = ctypes.CDLL(str(paths[0]))
        library.bitfloor_abi.restype = INTEGER
        found = library.bitfloor_abi()
        if found != ABI:
            return Loaded(None, f"it was built from another version (its number is {found}, not {ABI}); {again}")
        return Loaded(Library(library))
    except (OSError, AttributeError) as error:
        return Loaded(None, f"it cannot be loaded ({str(error).replace(f'{folder}{os.sep}', '')}); {again}")


def over_rows(function: Callable[[int, int], None], rows: int, work: int) -> None:
    """Call ``function(first, last)`` for all rows, in ranges on as many threads as torch uses.

    Args:
        function: what treats a range of rows.
        rows: how many there are.
        work: operations on a weight in all; less than a few hundred thousand are not worth a thread.
    """
    threads = max(1, min(torch.get_num_threads(), rows, work // WORK_PER_THREAD))
    borders = [rows * i // threads for i in range(threads + 1)]
    if threads == 1:
        function(0, rows)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(function, *ends) for ends in zip(borders[1:], borders[2:], strict=False)]
        function(*borders[:2])
        for other in others:
            other.result()


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]

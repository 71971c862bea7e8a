"""The packed kernels of the CPU (``csrc/packed``): whether they are there, why not, and their functions for tensors.

A library of its own beside that of :mod:`bitfloor.ops.native`, built and loaded in the same way. What it computes is
defined by :mod:`bitfloor.ops.packed_reference`. It takes the best instruction set that it finds;
``BITFLOOR_CPU=portable`` or ``avx2`` (``neon`` on ARM) holds it to less, for tests and for comparing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from platform import machine

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.ops.form import PARTS, Form

CPU = "BITFLOOR_CPU"
ARM = ("aarch64", "arm64")
# Instruction sets, from none on: what a processor of this kind may have.
LEVELS = ("portable", "neon", "dotprod") if machine().lower() in ARM else ("portable", "avx2", "avx512")
FOLDER = Path(__file__).resolve().parent
ABI = 3  # of csrc/packed/interface.cpp: raised with every change of a signature or of a value
MOST_ROWS = 8  # rows of x that one product takes
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "bitfloor_packed_level": (),
    "bitfloor_packed_huge": (POINTER, INTEGER),
    "bitfloor_packed_read": (POINTER, INTEGER, INTEGER),
    "bitfloor_packed_plan": (POINTER, INTEGER, POINTER, INTEGER),
    "bitfloor_packed_index": (*(POINTER,) * 5,),
    "bitfloor_packed_input": (*(POINTER,) * 5, INTEGER, INTEGER, POINTER),
    "bitfloor_packed_product": (*(POINTER,) * 5, *(INTEGER,) * 4),
    "bitfloor_packed_linear": (*(POINTER,) * 3, INTEGER, POINTER, POINTER, *(INTEGER,) * 4),
    "bitfloor_packed_rows": (*(POINTER,) * 3, INTEGER, INTEGER, POINTER, INTEGER, INTEGER),
}
NO_SUCH_ROW = 3
REASONS = {
    1: "the plan of the matrix is damaged",
    2: "its order names channels that it does not have, or another number of them; copy the checkpoint again",
    NO_SUCH_ROW: "a row was asked for that the packed matrix does not have",
    4: "there is no memory for its work space",
    5: "the call makes no sense",
}


class PackedLibrary:
    """The functions of ``packed_reference`` in native code, for tensors on the CPU.

    Args:
        library: a library whose number was checked.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, INTEGER
        self._library = library
        self.functions = library  # for what else is in it
        self.best = LEVELS[library.bitfloor_packed_level()]
        self.level = len(LEVELS) - 1  # the instruction set to use, as an index of ``LEVELS``; the best, if that is less

    def limit(self, wanted: str) -> None:
        """Use no more than an instruction set; all there is for an empty name.

        Raises:
            InputError: there is none of that name.
        """
        if wanted and wanted not in LEVELS:
            raise InputError(f"{CPU}={wanted} is not known; set it to one of {', '.join(LEVELS)}, or not at all.")
        self.level = min(LEVELS.index(wanted or self.best), LEVELS.index(self.best))

    def linear(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool) -> Tensor:
        """``x W^T + bias`` of any number of rows, in the dtype of ``x``: float32, float16 or bfloat16."""
        x, given = x.contiguous(), _contiguous(form, parts)
        bias = None if bias is None else bias.float().contiguous()
        (height, width), size = form.shape, x.element_size()
        out = torch.empty(*x.shape[:-1], height, dtype=torch.float32)
        pointers = (POINTER * 7)(*[_pointer(given.get(name)) for name in PARTS])
        plan, kind, threads = self.plan(form), TYPES[x.dtype], torch.get_num_threads()
        rows, start, y, shift = x.numel() // width, x.data_ptr(), out.data_ptr(), _pointer(bias)
        for at in range(0, rows, MOST_ROWS):
            here, there, count = start + size * at * width, y + 4 * at * height, min(MOST_ROWS, rows - at)
            done(
                self._library.bitfloor_packed_linear(
                    plan, pointers, here, kind, shift, there, count, int8, self.level, threads
                )
            )
        return out if x.dtype == torch.float32 else out.to(x.dtype)

    def stored_input(self, x: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.stored_input`; ``x`` is float32, float16 or bfloat16."""
        x, given = x.contiguous(), _contiguous(form, parts)
        out = torch.empty(*x.shape[:-1], form.padded, dtype=torch.float32)
        plan, rows = self.plan(form), x.numel() // form.shape[1]
        pointers = [_pointer(given.get(name)) for name in ("channels", "order", "channel_scale")]
        done(self._library.bitfloor_packed_input(plan, *pointers, x.data_ptr(), TYPES[x.dtype], rows, out.data_ptr()))
        return out

    def product(self, stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.product`, for any number of rows."""
        stored, given = stored.contiguous(), _contiguous(form, parts)
        bias = None if bias is None else bias.float().contiguous()
        height, width = form.shape[0], form.padded
        out = torch.empty(*stored.shape[:-1], height, dtype=torch.float32)
        pointers = (POINTER * 4)(*(_pointer(given.get(name)) for name in ("codes", "scale", "zero", "offset")))
        plan, level, threads = self.plan(form), self.level, torch.get_num_threads()
        rows, x, y = stored.numel() // width, stored.data_ptr(), out.data_ptr()
        for at in range(0, rows, MOST_ROWS):
            done(
                self._library.bitfloor_packed_product(
                    plan,
                    pointers,
                    x + 4 * at * width,
                    _pointer(bias),
                    y + 4 * at * height,
                    min(MOST_ROWS, rows - at),
                    int8,
                    level,
                    threads,
                )
            )
        return out

    def rows(
        self, parts: Sequence[Tensor], form: Form, ids: Tensor | None = None, first: int = 0, count: int = 0
    ) -> Tensor:
        """Dense rows ``[n, I]`` float32 of what is stored, in natural order: ``ids [n]``, or from ``first`` on."""
        given = _contiguous(form, parts)
        ids = None if ids is None else ids.to(torch.int64).contiguous()
        count = count if ids is None else ids.numel()
        out = torch.empty(count, form.shape[1], dtype=torch.float32)
        names = ("codes", "scale", "zero", "offset", "channel_scale", "order")
        pointers = (POINTER * 6)(*(_pointer(given.get(name)) for name in names))
        plan, level, threads = self.plan(form), self.level, torch.get_num_threads()
        done(
            self._library.bitfloor_packed_rows(
                plan, pointers, _pointer(ids), first, count, out.data_ptr(), level, threads
            )
        )
        return out

    def ask_for_huge_pages(self, tensor: Tensor) -> int:
        """Have a large tensor on huge pages, where the system can; returns for how many bytes it may have them."""
        return int(self._library.bitfloor_packed_huge(tensor.data_ptr(), tensor.numel() * tensor.element_size()))

    def read(self, tensor: Tensor) -> int:
        """Read a tensor and do nothing with it: how fast anything can be that reads it. For measuring."""
        size = tensor.numel() * tensor.element_size()
        return int(self._library.bitfloor_packed_read(tensor.data_ptr(), size, torch.get_num_threads()))

    def index(self, form: Form, parts: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Input channels as int32, checked: of every stored column ``[stored]``, and of every column before the
        rotation ``[I]``. None where they are in natural order."""
        given = _contiguous(form, parts)
        order, channels = given.get("order"), given.get("channels")
        stored = sum(segment.columns for segment in form.segments)
        index = None if order is None else torch.empty(stored, dtype=torch.int32)
        before = None if channels is None else torch.empty(form.shape[1], dtype=torch.int32)
        found = [_pointer(tensor) for tensor in (order, channels, index, before)]
        done(self._library.bitfloor_packed_index(self.plan(form), *found))
        return index, before

    def plan(self, form: Form) -> ctypes.Array[ctypes.c_char]:
        """A form as the kernels read it. The same one for the same form, for as long as it is used."""
        return _made_plan(self, form)


@lru_cache(maxsize=4096)
def _made_plan(library: PackedLibrary, form: Form) -> ctypes.Array[ctypes.c_char]:
    make = library._library.bitfloor_packed_plan
    numbers = (INTEGER * len(form.numbers))(*form.numbers)
    size = make(numbers, len(form.numbers), None, 0)
    if size <= 0:
        raise BitfloorError(
            f"the packed kernels cannot read the form {list(form.numbers)}; set BITFLOOR_BACKEND=reference."
        )
    plan = ctypes.create_string_buffer(size)
    make(numbers, len(form.numbers), plan, size)
    return plan


@dataclass(frozen=True)
class Loaded:
    """What came of loading the library.

    Args:
        library: None if there is none.
        reason: why there is none, a clause; empty if there is one.
    """

    library: PackedLibrary | None
    reason: str = ""


@cache
def load(folder: Path = FOLDER) -> Loaded:
    """Load the library from a folder, once.

    Raises:
        InputError: ``BITFLOOR_CPU`` names no instruction set.
    """
    if sys.byteorder == "big":
        return Loaded(None, "it reads codes on little-endian processors only")
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_packed{suffix}").is_file()]
    if not paths:
        return Loaded(None, "it was not built; install bitfloor where there is a C++ compiler")
    again = f"install bitfloor again to replace {paths[0].name}"
    try:
        library = ctypes.CDLL(str(paths[0]))
        library.bitfloor_packed_abi.restype = INTEGER
        found = library.bitfloor_packed_abi()
        if found != ABI:
            return Loaded(None, f"it was built from another version (its number is {found}, not {ABI}); {again}")
        made = PackedLibrary(library)
        made.limit(os.environ.get(CPU, ""))
        return Loaded(made)
    except (OSError, AttributeError) as error:
        return Loaded(None, f"it cannot be loaded ({str(error).replace(f'{folder}{os.sep}', '')}); {again}")


def _contiguous(form: Form, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: part.contiguous() for name, part in form.named(parts).items()}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def done(reason: int) -> None:
    """Raise what a function of the library returned, if it did nothing."""
    if reason == NO_SUCH_ROW:
        raise IndexError(f"{REASONS[reason]}.")
    if reason:
        raise BitfloorError(f"A packed matrix could not be used: {REASONS[reason]}.")

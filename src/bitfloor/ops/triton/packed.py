"""Packed matrices on a GPU: the functions of :mod:`bitfloor.ops.packed_reference` for tensors there.

- 1 to 8 rows of ``x``: codes are multiplied as they lie, with ``x`` as planes of bytes (``gemv.py``, ``activations.py``);
- more: tiles are made dense on the way into a product on tensor cores (``dense.py``), also where groups do not end with
  tiles;
- above ``SOME_ROWS``: a panel of rows is made dense and torch multiplies.

Nothing waits for the GPU and no launch depends on data, so all of it can be captured in a CUDA graph. Before that, call
once what will be captured: Triton compiles then, and what is known of a form (``launch.py``) is put on the device and
kept. Work space comes from torch's allocator, per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from bitfloor.core.basis import ordered, restored
from bitfloor.core.packed import column_index
from bitfloor.core.rotation import rotate
from bitfloor.ops import launch, packed_reference
from bitfloor.ops.form import Form
from bitfloor.ops.launch import FEW_ROWS, SOME_ROWS, FewRows, SomeRows
from bitfloor.ops.reference import panels
from bitfloor.ops.triton.activations import input_kernel, rotate_kernel
from bitfloor.ops.triton.dense import gemm_kernel, rows_kernel
from bitfloor.ops.triton.gemv import gemv_kernel

COMPILED = isinstance(gemv_kernel, triton.JITFunction)  # not so under TRITON_INTERPRET=1
FLOAT_PLANES = 3
PROCESSORS = 4  # that the interpreter pretends to have
SIGNED = {torch.uint8: torch.int8, torch.uint16: torch.int16, torch.uint32: torch.int32}
DENSE_ROWS, DENSE_TILES = 32, 4  # of a program that makes rows dense
EXACT = {"enable_fp_fusion": False}  # products are not fused with sums: values are those of the interpreter
Parts = dict[str, Tensor]


class PackedTriton:
    """The packed kernels of a GPU; tensors on the CPU where Triton interprets."""

    def linear(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool) -> Tensor:
        """``x W^T + bias``: ``[..., I]`` to ``[..., O]`` in the dtype of ``x``: float32, float16 or bfloat16."""
        given, rows = _given(form, parts), x.numel() // form.shape[1]
        if int8 and (rows > FEW_ROWS or not launch.aligned(form)):
            return self.product(self.stored_input(x, parts, form), parts, bias, form, True).to(x.dtype)
        flat = x.reshape(rows, form.shape[1]).contiguous()
        with _on(x):
            if rows <= FEW_ROWS and launch.aligned(form):
                y = _few(flat, given, bias, form, 1 if int8 else FLOAT_PLANES, x.dtype)
            else:
                y = self._many(_in_order(flat, given, form), given, bias, form, x.dtype)
        return y.view(*x.shape[:-1], form.shape[0])

    def stored_input(self, x: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.stored_input`."""
        given, rows = _given(form, parts), x.numel() // form.shape[1]
        out = torch.empty(rows, form.padded, dtype=torch.float32, device=x.device)
        with _on(x):
            _input(x.reshape(rows, form.shape[1]).contiguous(), given, form, 0, False, out, None)
        return out.view(*x.shape[:-1], form.padded)

    def product(self, stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.product`."""
        given, rows = _given(form, parts), stored.numel() // form.padded
        flat = stored.reshape(rows, form.padded).float().contiguous()
        with _on(stored):
            if rows <= FEW_ROWS and launch.aligned(form):
                planes = 1 if int8 else FLOAT_PLANES
                y = _few(flat, given, bias, form, planes, torch.float32, stored=True)
            else:
                y = self._many(_unpadded(flat, form, int8), given, bias, form, torch.float32, scaled=False)
        return y.view(*stored.shape[:-1], form.shape[0])

    def embedding(self, ids: Tensor, parts: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.embedding`. A row that is not there has no numbers."""
        given, flat = _given(form, parts), ids.reshape(-1).contiguous()
        with _on(ids):
            rows = _dense(given, form, torch.float32, ids=flat)
            rows = restored(rotate(_natural(rows, given, form), form.rotation), _wide(given.get("channels")))
        return rows.to(dtype).view(*ids.shape, form.shape[1])

    def gradient(self, grad: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.input_gradient`."""
        given = _given(form, parts)
        found = grad.new_zeros(*grad.shape[:-1], _columns(form))
        with _on(grad):
            for start, stop in panels(*form.shape, grad.device):
                found += grad[..., start:stop] @ _dense(given, form, grad.dtype, first=start, count=stop - start)
            found = rotate(_natural(found, given, form), form.rotation)
        return restored(found, _wide(given.get("channels")))

    def rows(self, parts: Sequence[Tensor], form: Form, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Some rows as they are stored, channel scales included: ``[count, stored columns]``."""
        with _on(parts[0]):
            return _dense(_given(form, parts), form, dtype, first=first, count=count)

    @staticmethod
    def _many(
        x: Tensor, given: Parts, bias: Tensor | None, form: Form, dtype: torch.dtype, scaled: bool = True
    ) -> Tensor:
        """``x [rows, stored columns]`` times the matrix as it is stored."""
        if x.shape[0] <= SOME_ROWS:
            return _some(x, given, bias, form, dtype, scaled)
        out = []
        for start, stop in panels(form.shape[0], x.shape[1], x.device):
            weight = _dense(given, form, x.dtype, first=start, count=stop - start, scaled=scaled)
            out.append(F.linear(x, weight, None if bias is None else bias[start:stop].to(x.dtype)))
        return (out[0] if len(out) == 1 else torch.cat(out, dim=-1)).to(dtype)


# -- launches ---------------------------------------------------------------------------------------------------------


def _few(
    x: Tensor,
    given: Parts,
    bias: Tensor | None,
    form: Form,
    planes: int,
    dtype: torch.dtype,
    stored: bool = False,
    cut: FewRows | None = None,
) -> Tensor:
    """Up to eight rows ``x [rows, I]``, or in stored order ``[rows, padded]``, to ``[rows, O]``."""
    rows, height = x.shape[0], form.shape[0]
    out = torch.empty(rows, height, dtype=dtype, device=x.device)
    if not rows:
        return out
    cut = cut or launch.few_rows(form, rows, _processors(x.device))
    tiles, slices = form.padded // 32, len(cut.pieces)
    programs = triton.cdiv(-(-height // 16), cut.blocks)
    records = triton.cdiv(tiles, 8)
    values = torch.empty(rows * records * 8 * (9 * planes + 1), dtype=torch.int32, device=x.device)
    counters = torch.empty(programs, dtype=torch.int32, device=x.device) if slices > 1 else None
    _input(x, given, form, planes, stored, values, counters)
    partial = torch.empty(slices * rows * height if slices > 1 else 0, dtype=torch.float32, device=x.device)
    single = launch.variant(form, 0) if len(form.segments) == 1 else -1
    first = launch.table(form, cut.pieces)[0]
    gemv_kernel[(programs, slices)](
        *_stored(given),
        values,
        values if single >= 0 else _on_device(form, x.device, cut),
        values if bias is None else bias.contiguous(),
        out,
        partial,
        values if counters is None else counters,
        height,
        -(-height // 16),
        *_strides(given),
        tiles,
        records,
        rows,
        slices,
        cut.pieces[0].stop,
        first[8],
        first[9],
        M=cut.rows,
        R=cut.blocks,
        T=cut.step,
        PLANES=planes,
        VARIANTS=launch.variants(form),
        SINGLE=single,
        SPLIT=slices > 1,
        BIAS=bias is not None,
        ASM=COMPILED,
        num_warps=cut.warps,
        **EXACT,
    )
    return out


def _some(
    x: Tensor,
    given: Parts,
    bias: Tensor | None,
    form: Form,
    dtype: torch.dtype,
    scaled: bool,
    cut: SomeRows | None = None,
) -> Tensor:
    """``x [rows, stored columns]`` times the matrix, on tensor cores."""
    rows, height = x.shape[0], form.shape[0]
    x = _padded(x, form)
    wide = x.dtype == torch.float32
    cut = cut or launch.some_rows(form, rows, _processors(x.device), wide)
    out = torch.empty(cut.split, rows, height, dtype=dtype if cut.split == 1 else torch.float32, device=x.device)
    if not rows:
        return out[0]
    scale = given.get("channel_scale") if scaled else None
    gemm_kernel[(triton.cdiv(height, cut.rows), triton.cdiv(rows, cut.x_rows), cut.split)](
        x,
        *_stored(given),
        x if scale is None else scale,
        _on_device(form, x.device, cut),
        x if bias is None else bias.contiguous(),
        out,
        rows,
        height,
        form.padded // 32,
        len(cut.pieces),
        cut.split,
        *_strides(given),
        M=cut.x_rows,
        N=cut.rows,
        T=cut.step,
        VARIANTS=launch.variants(form),
        ALIGNED=launch.aligned(form),
        SCALED=scale is not None,
        BIAS=bias is not None and cut.split == 1,
        PRECISION="ieee",
        num_warps=cut.warps,
        **EXACT,
    )
    if cut.split == 1:
        return out[0]
    total = out.sum(0)
    return (total if bias is None else total + bias.float()).to(dtype)


def _dense(
    given: Parts,
    form: Form,
    dtype: torch.dtype,
    ids: Tensor | None = None,
    first: int = 0,
    count: int = 0,
    scaled: bool = True,
) -> Tensor:
    """Rows ``ids [n]``, or ``count`` from ``first``, as they are stored: ``[n, stored columns]``."""
    codes = given["codes"]
    count, width = count if ids is None else ids.numel(), _columns(form)
    out = torch.empty(count, width, dtype=dtype, device=codes.device)
    if not count:
        return out
    scale = given.get("channel_scale") if scaled else None
    table = _on_device(form, codes.device, None)
    rows_kernel[(triton.cdiv(count, DENSE_ROWS), table.shape[0])](
        *_stored(given),
        codes if scale is None else scale,
        table,
        codes if ids is None else ids,
        out,
        first,
        count,
        form.shape[0],
        width,
        *_strides(given),
        N=DENSE_ROWS,
        T=DENSE_TILES,
        VARIANTS=launch.variants(form),
        ALIGNED=launch.aligned(form),
        SCALED=scale is not None,
        IDS=ids is not None,
        num_warps=4,
        **EXACT,
    )
    return out


def _input(
    x: Tensor, given: Parts, form: Form, planes: int, stored: bool, out: Tensor, counters: Tensor | None
) -> None:
    """The input side of ``x [rows, I]``, or of ``[rows, padded]`` that is in stored order."""
    if not x.shape[0]:
        return
    columns = form.shape[1]
    channels = None if stored else given.get("channels")
    order, unit = (None, 1) if stored else _order(given, form)
    if form.rotation and not stored:
        x, channels = _rotated(x, channels, form), None
    scale = None if stored else given.get("channel_scale")
    units = _units(form, planes == 1, x.device)
    input_kernel[(units.shape[0], x.shape[0])](
        x,
        units if order is None else order,
        units if channels is None else channels,
        x if scale is None else scale,
        units,
        out,
        units if counters is None else counters,
        form.padded,
        form.padded if stored else columns,
        unit,
        triton.cdiv(form.padded, 256),
        0 if counters is None else counters.numel(),
        ORDER=0 if order is None else order.element_size(),
        CHANNELS=0 if channels is None else channels.element_size(),
        SCALED=scale is not None,
        STORED=stored,
        PLANES=planes,
        num_warps=1,
        **EXACT,
    )


def _rotated(x: Tensor, channels: Tensor | None, form: Form) -> Tensor:
    """``x P R`` of ``[rows, I]``, float32."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    blocks = _turns(form.shape[1], form.rotation, x.device)
    half = form.rotation.bit_length() // 2
    rotate_kernel[(blocks.shape[0], x.shape[0])](
        x,
        blocks if channels is None else channels,
        blocks,
        out,
        form.shape[1],
        BYTES=0 if channels is None else channels.element_size(),
        A=form.rotation >> half,
        B=1 << half,
        num_warps=1 if form.rotation <= 64 else 4,
        **EXACT,
    )
    return out


# -- parts ------------------------------------------------------------------------------------------------------------


def _on(tensor: Tensor) -> Any:
    """Launches inside go to the tensor's own GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _given(form: Form, parts: Sequence[Tensor]) -> Parts:
    """Parts by name as kernels read them: in one piece, and where 16 bytes can be read at once."""
    found = {}
    for name, part in form.named(parts).items():
        part = part.contiguous()
        part = part.clone() if part.data_ptr() % 16 else part
        found[name] = part.view(SIGNED[part.dtype]) if name in ("order", "channels") else part
    return found


def _stored(given: Parts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes as dwords, scales, zero-points as 16-bit words, offsets; something else where there are none."""
    codes, scale = given["codes"].view(torch.int32), given["scale"]
    zero = given["zero"].view(torch.int16) if "zero" in given else codes
    return codes, scale, zero, given.get("offset", scale)


def _strides(given: Parts) -> tuple[int, int, int, int]:
    """Lines, groups, 16-bit words of zero-points and groups with offsets of a row block."""
    zero, offset = given.get("zero"), given.get("offset")
    lines = given["codes"].shape[1] // 64
    words = 0 if zero is None else zero.shape[1] // 2
    return lines, given["scale"].shape[1], words, 0 if offset is None else offset.shape[1]


def _columns(form: Form) -> int:
    """Stored columns."""
    return sum(segment.columns for segment in form.segments)


def _order(given: Parts, form: Form) -> tuple[Tensor | None, int]:
    """The order of stored columns and what an entry stands for."""
    order, unit = given.get("order"), form.numbers[2]
    if order is None or form.shape[1] % unit == 0:
        return order, unit or 1
    # The last channels fill no whole entry, and where that entry stands is not known here.
    return _index(given, form).to(torch.int32), 1


def _index(given: Parts, form: Form) -> Tensor:
    """Input channel of every stored column, int64, in shapes that do not depend on values."""
    unit, inputs = form.numbers[2], form.shape[1]
    order = _wide(given["order"])
    assert order is not None
    index = (order.unsqueeze(1) * unit + torch.arange(unit, device=order.device)).reshape(-1)
    there = index < inputs
    place = torch.where(there, there.cumsum(0) - 1, _columns(form)).clamp_max(_columns(form))
    return index.new_zeros(_columns(form) + 1).scatter_(0, place, index)[:-1]


def _wide(index: Tensor | None) -> Tensor | None:
    """Entries of an order as int64."""
    if index is None:
        return None
    unsigned = {signed: dtype for dtype, signed in SIGNED.items()}[index.dtype]
    return index.view(unsigned).to(torch.int64)


def _in_order(x: Tensor, given: Parts, form: Form) -> Tensor:
    """``x [rows, I]`` in stored order ``[rows, stored columns]``, in its dtype."""
    x = rotate(ordered(x, _wide(given.get("channels"))), form.rotation)
    return x.index_select(-1, _index(given, form)) if "order" in given else x


def _natural(stored: Tensor, given: Parts, form: Form) -> Tensor:
    """Columns ``[..., stored columns]`` where they belong, ``[..., I]``: those of one channel are added."""
    if "order" not in given:
        return stored
    return stored.new_zeros(*stored.shape[:-1], form.shape[1]).index_add_(-1, _index(given, form), stored)


def _padded(x: Tensor, form: Form) -> Tensor:
    """``[rows, stored columns]`` with zeros behind every segment, up to whole tiles; ``x`` itself where none are needed."""
    if form.padded == x.shape[1]:
        x = x.contiguous()
        return x.clone() if x.data_ptr() % 16 else x
    out, at, column = x.new_zeros(x.shape[0], form.padded), 0, 0
    for segment in form.segments:
        out[:, at : at + segment.columns] = x[:, column : column + segment.columns]
        at += segment.columns + -segment.columns % 32
        column += segment.columns
    return out


def _unpadded(stored: Tensor, form: Form, int8: bool) -> Tensor:
    """``[rows, padded]`` without padding, rounded as int8 activations are if wanted."""
    found, at = [], 0
    for segment in form.segments:
        own = stored[:, at : at + segment.columns]
        found.append(packed_reference.rounded(own, segment.activation_block) if int8 else own)
        at += segment.columns + -segment.columns % 32
    return torch.cat(found, dim=-1)


# -- kept on the device -----------------------------------------------------------------------------------------------


def _tensor(values: list[list[int]], device: torch.device) -> Tensor:
    # It is kept for all callers, whatever the mode of the first.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int32, device=device)


@lru_cache(maxsize=4096)
def _on_device(form: Form, device: torch.device, cut: FewRows | SomeRows | None) -> Tensor:
    """The table of pieces of a launch, or of all columns in steps of ``DENSE_TILES``."""
    pieces = launch.pieces(form, 1 << 30, DENSE_TILES) if cut is None else cut.pieces
    return _tensor(launch.table(form, pieces), device)


@lru_cache(maxsize=4096)
def _units(form: Form, int8: bool, device: torch.device) -> Tensor:
    return _tensor(launch.units(form, int8), device)


@lru_cache(maxsize=256)
def _turns(columns: int, size: int, device: torch.device) -> Tensor:
    return _tensor(launch.turns(columns, size), device)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

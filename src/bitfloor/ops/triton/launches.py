"""Launches of the packed kernels, and what they keep on a device."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from bitfloor.ops import launch
from bitfloor.ops.form import Form
from bitfloor.ops.launch import FewRows, SomeRows
from bitfloor.ops.triton.activations import input_kernel, rotate_kernel
from bitfloor.ops.triton.dense import gemm_kernel, rows_kernel
from bitfloor.ops.triton.gemv import gemv_kernel
from bitfloor.ops.triton.parts import Matrix

COMPILED = isinstance(gemv_kernel, triton.JITFunction)  # not so under TRITON_INTERPRET=1
FLOAT_PLANES = 3
PROCESSORS = 4  # that the interpreter pretends to have
DENSE_ROWS, DENSE_TILES = 64, 4  # of a program that makes rows dense
CHOSEN_ROWS = 16  # of one that makes chosen rows dense, which are few
ZEROED = 256  # columns to a program, of the input side
EXACT = {"enable_fp_fusion": False}  # products are not fused with sums: values are those of the interpreter


def few(
    x: Tensor,
    matrix: Matrix,
    bias: Tensor | None,
    planes: int,
    dtype: torch.dtype,
    stored: bool = False,
    cut: FewRows | None = None,
) -> Tensor:
    """Up to eight rows times a matrix whose groups end with tiles.

    Args:
        x: ``[rows, I]``, or ``[rows, padded]`` if it is ``stored``.
        matrix: the matrix.
        bias: ``[O]`` or None.
        planes: 3, or 1 for int8 activations.
        dtype: of the result.
        stored: whether ``x`` is in stored order.
        cut: of the work; None chooses.

    Returns:
        ``[rows, O]``.
    """
    out = torch.empty(x.shape[0], matrix.form.shape[0], dtype=dtype, device=x.device)
    if x.shape[0]:
        cut = cut or launch.few_rows(matrix.form, x.shape[0], processors(x.device))
        values, counters = as_planes(x, matrix, planes, stored, cut)
        of_planes(values, counters, matrix, bias, planes, cut, out)
    return out


def as_planes(x: Tensor, matrix: Matrix, planes: int, stored: bool, cut: FewRows) -> tuple[Tensor, Tensor | None]:
    """``x`` as planes of bytes, and the counters of its product, at zero, if that is cut into slices."""
    records = triton.cdiv(matrix.form.padded // 32, 8)
    values = torch.empty(x.shape[0] * records * 8 * (9 * planes + 1), dtype=torch.int32, device=x.device)
    programs = triton.cdiv(-(-matrix.form.shape[0] // 16), cut.blocks) * triton.cdiv(x.shape[0], cut.rows)
    counters = torch.empty(programs, dtype=torch.int32, device=x.device) if len(cut.pieces) > 1 else None
    input_side(x, matrix, planes, stored, values, counters)
    return values, counters


def of_planes(
    values: Tensor,
    counters: Tensor | None,
    matrix: Matrix,
    bias: Tensor | None,
    planes: int,
    cut: FewRows,
    out: Tensor,
) -> None:
    """The product with what :func:`as_planes` made, to ``out [rows, O]``; counters are at zero again afterwards."""
    form, (rows, height), slices = matrix.form, out.shape, len(cut.pieces)
    partial = torch.empty(slices * rows * height if slices > 1 else 0, dtype=torch.float32, device=out.device)
    single = launch.variant(form, 0) if len(form.segments) == 1 else -1
    first, blocks, tiles = launch.table(form, cut.pieces)[0], -(-height // 16), form.padded // 32
    with on(out):
        gemv_kernel[(triton.cdiv(blocks, cut.blocks), slices, triton.cdiv(rows, cut.rows))](
            *matrix.stored(),
            values,
            values if single >= 0 else _table(form, out.device, cut),
            values if bias is None else bias.contiguous(),
            out,
            partial,
            values if counters is None else counters,
            height,
            blocks,
            *matrix.strides(),
            tiles,
            triton.cdiv(tiles, 8),
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


def some(
    x: Tensor,
    matrix: Matrix,
    bias: Tensor | None,
    dtype: torch.dtype,
    scaled: bool = True,
    cut: SomeRows | None = None,
) -> Tensor:
    """``x [rows, stored columns]`` times a matrix, on tensor cores: ``[rows, O]``.

    Args:
        x, matrix, bias, dtype, cut: see :func:`few`.
        scaled: whether channel scales count.
    """
    form, rows, height = matrix.form, x.shape[0], matrix.form.shape[0]
    cut = cut or launch.some_rows(form, rows, processors(x.device), x.dtype == torch.float32)
    out = torch.empty(cut.split, rows, height, dtype=dtype if cut.split == 1 else torch.float32, device=x.device)
    if not rows:
        return out[0].to(dtype)
    x, scale = matrix.padded(x), matrix.parts.get("channel_scale") if scaled else None
    with on(x):
        gemm_kernel[(triton.cdiv(height, cut.rows), triton.cdiv(rows, cut.x_rows), cut.split)](
            x,
            *matrix.stored(),
            x if scale is None else scale,
            _table(form, x.device, cut),
            x if bias is None else bias.contiguous(),
            out,
            rows,
            height,
            form.padded // 32,
            len(cut.pieces),
            cut.split,
            *matrix.strides(),
            M=cut.x_rows,
            N=cut.rows,
            T=cut.step,
            VARIANTS=launch.variants(form),
            ALIGNED=matrix.aligned,
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


def dense(
    matrix: Matrix,
    dtype: torch.dtype,
    ids: Tensor | None = None,
    first: int = 0,
    count: int = 0,
    scaled: bool = True,
) -> Tensor:
    """Rows as they are stored, padded with any numbers: ``[n, padded]``.

    Args:
        matrix, dtype, scaled: see :func:`some`.
        ids: which rows, ``[n]``; None for ``count`` rows from ``first`` on, a multiple of 16.
        first, count: see ``ids``.
    """
    count = count if ids is None else ids.numel()
    out = torch.empty(count, matrix.form.padded, dtype=dtype, device=matrix.device)
    if not count:
        return out
    codes, scale = matrix.parts["codes"], matrix.parts.get("channel_scale") if scaled else None
    table = _table(matrix.form, matrix.device, None)
    height = DENSE_ROWS if ids is None else CHOSEN_ROWS
    with on(out):
        rows_kernel[(triton.cdiv(count, height), table.shape[0])](
            *matrix.stored(),
            codes if scale is None else scale,
            table,
            codes if ids is None else ids,
            out,
            first // 16,
            count,
            matrix.form.shape[0],
            matrix.form.padded // 32,
            *matrix.strides(),
            N=height,
            T=DENSE_TILES,
            VARIANTS=launch.variants(matrix.form),
            ALIGNED=matrix.aligned,
            SCALED=scale is not None,
            IDS=ids is not None,
            num_warps=4,
            **EXACT,
        )
    return out


def input_side(x: Tensor, matrix: Matrix, planes: int, stored: bool, out: Tensor, counters: Tensor | None) -> None:
    """Order, rotation and channel scales, to ``out``: float32 ``[rows, padded]`` for no planes, else planes.

    Args:
        x, matrix, planes, stored: see :func:`few`; 0 planes are floats.
        out: what is written.
        counters: set to zero on the way, if there are any.
    """
    if not x.shape[0]:
        return
    form, columns = matrix.form, matrix.form.shape[1]
    order, unit = (None, 1) if stored else matrix.order()
    channels, scale = (None if stored else matrix.parts.get(name) for name in ("channels", "channel_scale"))
    if form.rotation and not stored:
        x, channels = _rotated(x, channels, form), None
    units = _units(form, planes == 1, x.device)
    with on(x):
        input_kernel[(x.shape[0], units.shape[0])](
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
            triton.cdiv(form.padded, ZEROED),
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
    with on(x):
        rotate_kernel[(x.shape[0], blocks.shape[0])](
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


def on(tensor: Tensor) -> Any:
    """Launches inside go to the tensor's own GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# -- kept on the device -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=4096)
def _table(form: Form, device: torch.device, cut: FewRows | SomeRows | None) -> Tensor:
    """The table of pieces of a launch, or of all columns in steps of ``DENSE_TILES``."""
    pieces = launch.pieces(form, launch.MOST_PIECES, DENSE_TILES) if cut is None else cut.pieces
    return _kept(launch.table(form, pieces), device)


@lru_cache(maxsize=4096)
def _units(form: Form, int8: bool, device: torch.device) -> Tensor:
    return _kept(launch.units(form, int8), device)


@lru_cache(maxsize=256)
def _turns(columns: int, size: int, device: torch.device) -> Tensor:
    return _kept(launch.turns(columns, size), device)


def _kept(values: Any, device: torch.device) -> Tensor:
    # It is kept for all callers, whatever the mode of the first.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int32, device=device)

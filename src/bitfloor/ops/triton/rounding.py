"""Fake quantization for learned rounding on GPUs: the passes of :mod:`bitfloor.ops.rounding_reference` in Triton.

A program treats some rows of one group: each element is read once and written once, and no intermediate goes through
memory. Values equal the reference's (products are not fused with sums); sums are over a tree of fixed shape, so they
are deterministic, but their last bits differ from the reference's.

Imported only where a tensor lies on a GPU, or by tests through Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of one program
# Adding and subtracting it rounds half to even where the result matters; what is larger is clamped.
MAGIC = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(weight, shift, scale, zero, top, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code and whether it was not clamped, of a tile; ``scale`` and ``zero`` are columns."""
    code = tl.math.div_rn(weight + zero * scale, tl.broadcast_to(scale, weight.shape))
    if SHIFTED:
        code = code + shift
    code = tl.where(tl.abs(code) < 1048576.0, (code + MAGIC) - MAGIC, code)
    inside = (code >= 0.0) & (code <= top)
    return tl.minimum(tl.maximum(code, 0.0), top), inside


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    weight, shift, scale, zero, rows, columns, groups, size, R: tl.constexpr, B: tl.constexpr, SHIFTED: tl.constexpr
):
    """A program's tile: its elements' places and which are in the matrix, likewise its groups', and what lies there."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    group = tl.program_id(1)
    inner = tl.arange(0, B)[None, :]
    column = group * size + inner
    here = (row < rows) & (inner < size) & (column < columns)
    at = row.to(tl.int64) * columns + column
    of = row.to(tl.int64) * groups + group
    s = tl.load(scale + of, mask=row < rows, other=1.0)
    z = tl.load(zero + of, mask=row < rows, other=0.0)
    w = tl.load(weight + at, mask=here, other=0.0)
    v = tl.load(shift + at, mask=here, other=0.0) if SHIFTED else w
    return at, here, of, row < rows, w, v, s, z


@triton.jit  # type: ignore[untyped-decorator]
def _round_kernel(  # type: ignore[no-untyped-def]
    weight,
    shift,
    scale,
    zero,
    out,
    rows,
    columns,
    groups,
    size,
    top,
    R: tl.constexpr,
    B: tl.constexpr,
    SHIFTED: tl.constexpr,
    CODES: tl.constexpr,
):
    """Write fake-quantized weights, or codes."""
    at, here, _, _, w, v, s, z = _tile(weight, shift, scale, zero, rows, columns, groups, size, R, B, SHIFTED)
    code, _ = _rounded(w, v, s, z, top, SHIFTED)
    if CODES:
        tl.store(out + at, code.to(tl.uint8), mask=here)
    else:
        tl.store(out + at, (code - z) * s, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _step_kernel(  # type: ignore[no-untyped-def]
    weight,
    shift,
    scale,
    zero,
    grad,
    towards,
    clipped,
    rate,
    rows,
    columns,
    groups,
    size,
    top,
    R: tl.constexpr,
    B: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Move ``shift`` in place and write both sums of every group."""
    at, here, of, known, w, v, s, z = _tile(weight, shift, scale, zero, rows, columns, groups, size, R, B, SHIFTED)
    g = tl.load(grad + at, mask=here, other=0.0)
    code, inside = _rounded(w, v, s, z, top, SHIFTED)
    exact = tl.where(inside, tl.math.div_rn(w, tl.broadcast_to(s, w.shape)), 0.0)
    # Elements outside of the matrix have no gradient.
    slope = tl.where(here, ((code - z) - exact) * g, 0.0)
    lost = tl.where(here & (inside == 0), -g, 0.0)
    tl.store(towards + of, tl.sum(slope, 1, keep_dims=True), mask=known)
    tl.store(clipped + of, tl.sum(lost, 1, keep_dims=True), mask=known)
    if SHIFTED:
        sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)) * tl.where(s > 0, 1.0, tl.where(s < 0, -1.0, 0.0))
        tl.store(shift + at, v - rate * tl.where(inside, sign, 0.0), mask=here)


class TritonLibrary:
    """The functions of :class:`bitfloor.ops.native.Library` that learning needs, for dense tensors on one GPU."""

    def fake_quantize(
        self, weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
    ) -> None:
        """Write the fake-quantized weight to ``out`` ``[O, I]`` float32."""
        self._round(weight, shift, scale, zero, bits, group_size, out)

    def codes(
        self, weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
    ) -> None:
        """Write the codes to ``out`` ``[O, I]`` uint8."""
        self._round(weight, shift, scale, zero, bits, group_size, out)

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
        programs, sizes, tile = _tiles(weight, scale, bits, group_size)
        if not weight.numel():
            return towards, clipped
        with _on(weight):
            _step_kernel[programs](
                weight,
                weight if shift is None else shift,
                scale,
                zero,
                grad,
                towards,
                clipped,
                rate,
                *sizes,
                **tile,
                SHIFTED=shift is not None,
                enable_fp_fusion=False,
            )
        return towards, clipped

    @staticmethod
    def _round(
        weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
    ) -> None:
        programs, sizes, tile = _tiles(weight, scale, bits, group_size)
        if not weight.numel():
            return
        given, wanted = shift is not None, out.dtype == torch.uint8
        with _on(weight):
            _round_kernel[programs](
                weight,
                shift if given else weight,
                scale,
                zero,
                out,
                *sizes,
                **tile,
                SHIFTED=given,
                CODES=wanted,
                enable_fp_fusion=False,
            )


def _on(tensor: Tensor) -> Any:
    """Launches inside go to the tensor's own GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _tiles(weight: Tensor, scale: Tensor, bits: int, group_size: int) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """Grid of programs, the sizes all kernels take, and rows and columns of a program's tile (powers of two)."""
    rows, columns = weight.shape
    size = min(group_size, max(columns, 1))
    width = triton.next_power_of_2(size)
    height = max(1, min(ELEMENTS // width, triton.next_power_of_2(max(rows, 1))))
    sizes = (rows, columns, scale.shape[1], size, float((1 << bits) - 1))
    return (triton.cdiv(rows, height), scale.shape[1]), sizes, {"R": height, "B": width}

"""Packed matrices on a GPU: the functions of :mod:`bitfloor.ops.packed_reference` for tensors there.

- 1 to 8 rows of ``x``: codes are multiplied as they lie, ``x`` is planes of bytes (``gemv.py``, ``activations.py``);
- more, or groups that do not end with tiles: tiles are made dense on the way into a product on tensor cores
  (``dense.py``);
- above ``SOME_ROWS``, or ``WIDE_ROWS`` in float32: a panel of rows is made dense, and torch multiplies.

Nothing waits for the GPU and no launch depends on data, so all of it can be captured in a CUDA graph. Before that, call
once what will be captured: Triton compiles then, and what follows from a form (:mod:`bitfloor.ops.launch`) is put on
the device and kept. Work space comes from torch's allocator, call by call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfloor.ops.form import Form
from bitfloor.ops.launch import FEW_ROWS, SOME_ROWS, WIDE_ROWS
from bitfloor.ops.reference import panels
from bitfloor.ops.triton import launches
from bitfloor.ops.triton.parts import Matrix


class PackedTriton:
    """The packed kernels of a GPU; tensors on the CPU where Triton interprets."""

    def linear(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool) -> Tensor:
        """``x W^T + bias``: ``[..., I]`` to ``[..., O]`` in the dtype of ``x``: float32, float16 or bfloat16."""
        matrix, rows = Matrix.of(form, parts), x.numel() // form.shape[1]
        few = rows <= FEW_ROWS and matrix.aligned
        if int8 and not few:
            return self.product(self.stored_input(x, parts, form), parts, bias, form, True).to(x.dtype)
        flat = x.reshape(rows, form.shape[1]).contiguous()
        if few:
            y = launches.few(flat, matrix, bias, 1 if int8 else launches.FLOAT_PLANES, x.dtype)
        else:
            y = _many(matrix.in_order(matrix.turned(flat)), matrix, bias, x.dtype)
        return y.view(*x.shape[:-1], form.shape[0])

    def stored_input(self, x: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.stored_input`."""
        rows = x.numel() // form.shape[1]
        out = torch.empty(rows, form.padded, dtype=torch.float32, device=x.device)
        flat = x.reshape(rows, form.shape[1]).contiguous()
        launches.input_side(flat, Matrix.of(form, parts), 0, False, out, None)
        return out.view(*x.shape[:-1], form.padded)

    def product(self, stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, int8: bool) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.product`."""
        matrix, rows = Matrix.of(form, parts), stored.numel() // form.padded
        flat = stored.reshape(rows, form.padded).float().contiguous()
        if rows <= FEW_ROWS and matrix.aligned:
            planes = 1 if int8 else launches.FLOAT_PLANES
            y = launches.few(flat, matrix, bias, planes, torch.float32, stored=True)
        else:
            y = _many(matrix.unpadded(flat, int8), matrix, bias, torch.float32, scaled=False)
        return y.view(*stored.shape[:-1], form.shape[0])

    def embedding(self, ids: Tensor, parts: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.embedding`. A row that is not there has no numbers."""
        matrix = Matrix.of(form, parts)
        rows = launches.dense(matrix, torch.float32, ids=ids.reshape(-1).contiguous())
        return matrix.turned_back(matrix.natural(matrix.unpadded(rows))).to(dtype).view(*ids.shape, form.shape[1])

    def gradient(self, grad: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor:
        """See :func:`bitfloor.ops.packed_reference.input_gradient`."""
        matrix = Matrix.of(form, parts)
        found = grad.new_zeros(*grad.shape[:-1], form.padded)
        for start, stop in panels(*form.shape, grad.device):
            found += grad[..., start:stop] @ launches.dense(matrix, grad.dtype, first=start, count=stop - start)
        return matrix.turned_back(matrix.natural(matrix.unpadded(found)))


def _many(x: Tensor, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, scaled: bool = True) -> Tensor:
    """``x [rows, stored columns]`` times the matrix as it is stored, with its channel scales or without."""
    if x.shape[0] <= (WIDE_ROWS if x.dtype == torch.float32 else SOME_ROWS):
        return launches.some(x, matrix, bias, dtype, scaled)
    return by_panels(x, matrix, bias, scaled).to(dtype)


def by_panels(x: Tensor, matrix: Matrix, bias: Tensor | None, scaled: bool = True) -> Tensor:
    """``x [rows, stored columns]`` times panels of rows that are made dense, by torch, in the dtype of ``x``."""
    x, out = matrix.padded(x), []
    for start, stop in panels(matrix.form.shape[0], x.shape[1], x.device):
        weight = launches.dense(matrix, x.dtype, first=start, count=stop - start, scaled=scaled)
        out.append(F.linear(x, weight, None if bias is None else bias[start:stop].to(x.dtype)))
    return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

"""Fake quantization for learned rounding in plain torch: what the native kernel equals, but for the sign of a zero.

| symbol | here | meaning |
| --- | --- | --- |
| ``w`` | ``weight`` ``[O, I]`` | weights |
| ``V`` | ``shift`` ``[O, I]`` or None | what is added before rounding, in steps of the grid |
| ``s, z`` | ``scale``, ``zero`` ``[O, G]`` | grid of each group; ``s`` may be negative, ``z`` need not be whole |
| ``g`` | ``grad`` ``[O, I]`` | gradient of a loss with respect to the fake-quantized weight |

In float32, one operation at a time and in this order, which without ``V`` is that of ``core.affine.encode``::

    r = round((w + z s) / s + V)        half to even
    c = clamp(r, 0, 2^b - 1)            m = 1 where c = r, else 0
    w_hat = (c - z) s
    V <- V - rate sign(g) sign(s) m
    towards = sum_j g (c - z - m w / s)         dL/ds without the part that goes through z
    clipped = sum_j g (m - 1)                   dL/dz / s

Sums have a fixed order too: 16 running sums, column ``j`` of a group into sum ``j mod 16``, then folded in halves. So
nothing here depends on the processor, the number of threads, or on whether the native kernel was built.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 19  # weights treated at once, so that the passes stay in the caches
LANES = 16


def fake_quantize(
    weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
) -> None:
    """Write ``w_hat`` to ``out`` ``[O, I]`` float32."""
    for rows in chunks(weight):
        code, _ = _rounded(weight, shift, scale, zero, bits, group_size, rows)
        out[rows] = _flat(code.sub_(zero[rows, :, None]).mul_(scale[rows, :, None]), weight.shape[1])


def codes(
    weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, out: Tensor
) -> None:
    """Write ``c`` to ``out`` ``[O, I]`` uint8."""
    for rows in chunks(weight):
        code, _ = _rounded(weight, shift, scale, zero, bits, group_size, rows)
        out[rows] = _flat(code, weight.shape[1]).to(torch.uint8)


def sign_step(
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
    nothing = weight.new_zeros(())
    for rows in chunks(weight):
        wide = scale[rows, :, None]
        code, inside = _rounded(weight, shift, scale, zero, bits, group_size, rows)
        gradient = groups_of(grad[rows], group_size)
        # Selected rather than multiplied with: w / s is infinite where a range has shrunk to nothing.
        exact = torch.where(inside, groups_of(weight[rows], group_size) / wide, nothing)
        towards[rows] = lane_sum(code.sub_(zero[rows, :, None]).sub_(exact).mul_(gradient))
        clipped[rows] = lane_sum(torch.where(inside, nothing, -gradient))
        if shift is not None:
            moved = torch.sign(gradient).mul_(torch.sign(wide)).mul_(inside)
            shift[rows] -= rate * _flat(moved, weight.shape[1])
    return towards, clipped


def lane_sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, ``[..., n]`` to ``[...]``, in the order the kernel adds."""
    blocks = groups_of(values, LANES)
    lanes = torch.zeros_like(blocks[..., 0, :])
    for k in range(blocks.shape[-2]):
        lanes += blocks[..., k, :]
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half:]
        half //= 2
    return lanes[..., 0]


def _rounded(
    weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int, rows: slice
) -> tuple[Tensor, Tensor]:
    """``c`` of some rows as float32 ``[rows, G, g]``, and where it was not clamped (bool)."""
    top = float((1 << bits) - 1)
    wide = scale[rows, :, None]
    code = (groups_of(weight[rows], group_size) + zero[rows, :, None] * wide).div_(wide)
    if shift is not None:
        code += groups_of(shift[rows], group_size)
    code.round_()
    inside = (code >= 0.0) & (code <= top)
    return code.clamp_(0.0, top), inside


def groups_of(values: Tensor, size: int) -> Tensor:
    """``[..., I]`` as ``[..., G, g]``, a short last group padded with zeros."""
    count = -(-values.shape[-1] // size)
    padded = torch.nn.functional.pad(values, (0, count * size - values.shape[-1]))
    return padded.reshape(*values.shape[:-1], count, size)


def _flat(groups: Tensor, columns: int) -> Tensor:
    """``[rows, G, g]`` back to ``[rows, I]``, the padding of a short last group dropped."""
    return groups.flatten(1)[:, :columns]


def chunks(weight: Tensor) -> Iterator[slice]:
    """Ranges of rows that are treated at once."""
    rows = max(1, CHUNK // max(1, weight.shape[1]))
    return (slice(begin, begin + rows) for begin in range(0, weight.shape[0], rows))

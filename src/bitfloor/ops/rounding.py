"""Fake quantization for learned rounding: forward, codes, and the signed step with its sums, each in one pass.

What is computed is defined in :mod:`bitfloor.ops.rounding_reference`, in torch, for any device and any strides. Dense
float32 matrices on the CPU go to the native kernel (``csrc/rounding.cpp``) if it was built, those on a GPU to Triton's;
both give the same values, but for the last bits of Triton's sums.
Nothing here is part of a graph: the gradient of the loss is an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.ops import rounding_reference as reference
from bitfloor.ops.native import rounding_for


@torch.no_grad()
def fake_quantize(
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    out: Tensor | None = None,
) -> Tensor:
    """The weights that rounding to a grid leaves.

    Equation: ``(clamp(round((w + z s) / s + V), 0, 2^b - 1) - z) s``.

    Args:
        weight: ``[O, I]`` float32.
        shift: ``[O, I]`` float32, ``V``, in steps of the grid; None is zero.
        scale: ``[O, G]`` float32, finite and not zero, may be negative; ``G = ceil(I / group_size)``.
        zero: ``[O, G]`` float32, the zero-point; need not be a whole number.
        bits: 1 to 8.
        group_size: columns per group, positive; the last group may be short.
        out: ``[O, I]`` float32 to write to; must not overlap an input. None makes one.

    Returns:
        ``[O, I]`` float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(weight, scale, zero, bits, group_size, shift=shift, out=out)
    out = torch.empty_like(weight) if out is None else out
    library = rounding_for(weight, shift, scale, zero, out)
    if library is None:
        reference.fake_quantize(weight, shift, scale, zero, bits, group_size, out)
    else:
        library.fake_quantize(weight, shift, scale, zero, bits, group_size, out)
    return out


@torch.no_grad()
def codes(weight: Tensor, shift: Tensor | None, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The codes behind :func:`fake_quantize`, which has the arguments: ``[O, I]`` uint8.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(weight, scale, zero, bits, group_size, shift=shift)
    out = torch.empty_like(weight, dtype=torch.uint8)
    library = rounding_for(weight, shift, scale, zero, out)
    if library is None:
        reference.codes(weight, shift, scale, zero, bits, group_size, out)
    else:
        library.codes(weight, shift, scale, zero, bits, group_size, out)
    return out


@torch.no_grad()
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
    """One step of ``shift`` against the sign of its gradient, and the sums from which scales and zero-points learn.

    Equation, with ``c`` the code and ``m`` one where it was not clamped, else zero::

        V <- V - rate sign(g) sign(s) m      towards = sum_j g (c - z - m w / s)      clipped = sum_j g (m - 1)

    Args:
        weight, scale, zero, bits, group_size: as in :func:`fake_quantize`.
        shift: ``[O, I]`` float32, changed in place; None stands for zero and only the sums are computed.
        grad: ``[O, I]`` float32, ``g``: gradient of the loss with respect to :func:`fake_quantize`'s result.
        rate: size of the step, in steps of the grid.

    Returns:
        ``towards`` and ``clipped``, ``[O, G]`` float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(weight, scale, zero, bits, group_size, shift=shift, grad=grad)
    library = rounding_for(weight, shift, scale, zero, grad)
    if library is None:
        return reference.sign_step(weight, shift, scale, zero, grad, rate, bits, group_size)
    return library.sign_step(weight, shift, scale, zero, grad, rate, bits, group_size)


def _check(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, **matrices: Tensor | None) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits do not fit a byte; use 1 to 8")
    if group_size < 1:
        raise ValueError(f"a group of {group_size} columns is no group; use 1 or more")
    if weight.dim() != 2:
        raise ValueError(f"the weight has shape {tuple(weight.shape)}; a matrix [O, I] is needed")
    rows, columns = weight.shape
    groups = (rows, -(-columns // group_size))
    wanted = {"weight": (weight, (rows, columns)), "scale": (scale, groups), "zero": (zero, groups)}
    wanted |= {name: (part, (rows, columns)) for name, part in matrices.items() if part is not None}
    for name, (part, shape) in wanted.items():
        if tuple(part.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(part.shape)}; {shape} is needed")
        if part.dtype != torch.float32:
            raise ValueError(f"{name} is {part.dtype}; torch.float32 is needed")
        if part.device != weight.device:
            raise ValueError(f"{name} is on {part.device} and the weight on {weight.device}; one device is needed")

"""A fixed rotation of the input channels: block by block a Hadamard matrix, which spreads what is loud over its block.

    w_hat = stored R        y = x w_hat^T = (x R) stored^T        R = diag(H_n, H_n, ..., tail),   H_n H_n = 1

``H_n`` is Sylvester's matrix of a power of two ``n``, divided by ``sqrt(n)``: symmetric and its own inverse, so is
``R``. Columns left over behind the last whole block are rotated in the powers of two that they are made of: 40 as 32
and 8. Nothing is stored but ``n``.

A group that holds one loud channel among quiet ones is hard to quantize; rotated, its weights are all of a size (QuIP#,
arXiv 2402.04396; QuaRot, arXiv 2404.00456, where blocks are whole rows and the rotation disappears in the neighbouring
layers; here it needs nothing of the architecture).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def rotate(x: Tensor, size: int) -> Tensor:
    """``x R`` along the last dimension; applied twice it gives ``x`` back.

    Args:
        x: ``[..., I]`` of a float type; computed in float32. The result may be larger by the square root of ``size``,
            which float16 does not hold beyond 65504.
        size: columns of a block, a power of two; 0 returns ``x`` itself.

    Returns:
        ``[..., I]`` in the type of ``x``.
    """
    columns = x.shape[-1]
    if not size or not x.numel():
        return x
    parts, done = [], 0
    with torch.autocast(x.device.type, enabled=False):
        for block in _blocks(columns, size):
            last = done + (columns - done) // block * block
            piece = x[..., done:last].float()
            turned = piece.reshape(-1, block) @ _hadamard(block, x.device)
            parts.append(turned.view(piece.shape).to(x.dtype))
            done = last
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def rotate_both(matrix: Tensor, size: int) -> Tensor:
    """``R matrix R`` for ``matrix [I, I]``: what ``X^T Y`` is for rotated ``X`` and ``Y``."""
    return rotate(rotate(matrix, size).t(), size).t().contiguous() if size else matrix


def _blocks(columns: int, size: int) -> list[int]:
    """Sizes of the blocks that occur, falling: whole ones, then the powers of two of what is left."""
    found = [size] if columns >= size else []
    rest = columns % size
    return [*found, *(1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1)]


@lru_cache(maxsize=64)
def _hadamard(size: int, device: torch.device) -> Tensor:
    """``H_n [n, n]`` float32."""
    # It is kept for all callers, whatever the mode and the default type of the first.
    with torch.inference_mode(False), torch.no_grad():
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix.mul_(size**-0.5)

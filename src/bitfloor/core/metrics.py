"""Errors of a quantized matrix, in the units reports use."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """``||approximation - reference||^2 / ||reference||^2`` over all elements; 0 when both are zero."""
    above = float((approximation.float() - reference.float()).square().sum(dtype=torch.float64))
    below = float(reference.float().square().sum(dtype=torch.float64))
    return above / below if below > 0 else (0.0 if above == 0 else float("inf"))


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Relative squared error of the layer's output, ``tr(D H D^T) / tr(W H W^T)`` with ``D = W_hat - W``.

    Args:
        weight: ``[O, I]``.
        approximation: ``[O, I]``.
        hessian: ``[I, I]`` ``X^T X`` in any scale.
    """
    hessian = hessian.float()
    difference = approximation.float() - weight.float()
    above = float(((difference @ hessian) * difference).sum(dtype=torch.float64))
    below = float(((weight.float() @ hessian) * weight.float()).sum(dtype=torch.float64))
    return 0.0 if below <= 0 else max(above, 0.0) / below  # NaN stays NaN

"""Factorisations that are allowed to meet a bad matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError

RETRIES = 7


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular ``U`` with ``U^T U = (H + damping * mean(diag H) * I)^-1``.

    Channels with a zero diagonal get a one there, so they are decoupled from the rest.

    Args:
        hessian: ``[I, I]`` symmetric positive semi-definite, any float dtype; not changed.
        damping: relative to the mean of the diagonal over live channels. Zero is allowed; on failure it is raised
            tenfold from at least 1e-4.

    Returns:
        ``(U, damping)``: float64 ``[I, I]`` and the damping that succeeded.

    Raises:
        BitfloorError: no damping up to the last retry made the matrix positive definite.
    """
    diagonal = hessian.diagonal().double()
    dead = diagonal <= 0
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    used = damping
    for _ in range(RETRIES):
        # Two float64 matrices are alive at any moment: for 11,008 channels each of them is a gigabyte.
        matrix = hessian.to(torch.float64, copy=True)
        matrix.diagonal().copy_(torch.where(dead, 1.0, diagonal + used * mean))
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) == 0:
            matrix = torch.cholesky_inverse(matrix)
            matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
            if int(failed) == 0 and all_finite(matrix):
                return matrix, used
        used = max(10.0 * used, 1e-4)
    raise BitfloorError(
        f"the Hessian of {hessian.shape[0]} channels is not positive definite even with damping {used / 10:g}; "
        "calibrate on more or more varied text."
    )


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, found without a second tensor of that size."""
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())  # the extremes carry a NaN from anywhere

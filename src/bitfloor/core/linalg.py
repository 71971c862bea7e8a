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
    matrix = hessian.double()
    diagonal = matrix.diagonal()
    dead = diagonal <= 0
    live = diagonal[~dead]
    mean = float(live.mean()) if live.numel() else 1.0
    used = damping
    for _ in range(RETRIES):
        damped = matrix.clone()
        damped.diagonal().add_(used * mean)
        damped.diagonal()[dead] = 1.0
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0 and bool(torch.isfinite(factor).all()):
                return factor, used
        used = max(10.0 * used, 1e-4)
    raise BitfloorError(
        f"the Hessian of {matrix.shape[0]} channels is not positive definite even with damping {used / 10:g}; "
        "calibrate on more or more varied text."
    )

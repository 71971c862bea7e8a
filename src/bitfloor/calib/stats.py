"""Statistics of activations, accumulated batch by batch.

Sums are kept in the precision they are multiplied in, float32, except vectors, which are float64 because that is free.
The Hessian of a matrix with 11,008 inputs is 485 MB in float32; doubling it would buy nothing: the relative error of a
float32 sum over some hundred batches stays below 1e-5, and every user of it adds a thousand times that as damping.
Batches are added in order, so equal inputs and an equal thread count give equal bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError


class HessianSum:
    """Streaming ``X^T X`` over rows of activations.

    Args:
        in_features: ``I``.
        device: where the sum is kept; batches must be there too.
    """

    def __init__(self, in_features: int, device: str | torch.device = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add activations ``[N, I]`` of any float type (multiplied in float32)."""
        x = _rows(x, self.total.shape[0])
        self.total.addmm_(x.t(), x)
        self.rows += x.shape[0]

    def mean(self) -> Tensor:
        """``X^T X / N`` as float32 ``[I, I]``; zeros if no row was seen."""
        return self.total / max(self.rows, 1)


class DriftSum:
    """Streaming ``(X - X')^T X'``: how the inputs ``X'`` in the quantized model differ from those in the float model.

    Args:
        in_features: ``I``.
        device: where the sum is kept; batches must be there too.
    """

    def __init__(self, in_features: int, device: str | torch.device = "cpu") -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, exact: Tensor, x: Tensor) -> None:
        """Add activations ``[N, I]`` of the float model and of the quantized model, row by row the same token."""
        x = _rows(x, self.total.shape[0])
        self.total.addmm_((_rows(exact, self.total.shape[0]) - x).t(), x)


class MomentSum:
    """Streaming per-channel second moments and largest magnitudes.

    Args:
        in_features: ``I``.
        device: where the sums are kept; batches must be there too.
    """

    def __init__(self, in_features: int, device: str | torch.device = "cpu") -> None:
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.peak = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add activations ``[N, I]`` of any float type."""
        x = _rows(x, self.total.shape[0])
        if x.shape[0]:
            self.total += x.square().sum(dim=0, dtype=torch.float64)
            torch.maximum(self.peak, x.abs().amax(dim=0), out=self.peak)
        self.rows += x.shape[0]

    def mean(self) -> Tensor:
        """``mean(x^2)`` per channel as float32 ``[I]``, the diagonal of the mean Hessian; zeros if no row was seen."""
        return (self.total / max(self.rows, 1)).float()


class RowCount:
    """How many activation rows (tokens) each name has seen; what tells a starved expert from a fed one."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Count the rows of ``x [N, I]`` for ``name``."""
        self.rows[name] = self.rows.get(name, 0) + x.shape[0]

    def starved(self, names: list[str], least: int) -> list[str]:
        """Those of ``names`` that saw fewer than ``least`` rows."""
        return [name for name in names if self.rows.get(name, 0) < least]


def _rows(x: Tensor, in_features: int) -> Tensor:
    if x.dim() != 2 or x.shape[1] != in_features:
        raise BitfloorError(f"activations of shape {list(x.shape)} do not fit a matrix with {in_features} inputs.")
    return x.detach().float()

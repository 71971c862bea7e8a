"""Statistics of activations, accumulated batch by batch.

Sums are float32, except those of vectors, which are float64 because that is free.
The Hessian of a matrix with 11,008 inputs is 485 MB in float32; doubling it would buy nothing: the relative error of a
float32 sum over some hundred batches stays below 1e-5, and every user of it adds a thousand times that as damping.
Batches are added in order, so equal inputs and an equal thread count give equal bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError

PANELS = 6
LEAST_PANEL = 128


class HessianSum:
    """Streaming ``X^T X`` over rows of activations.

    The products are float32 whatever the model's own are: a Hessian whose entries were rounded to bfloat16 need not be
    positive semi-definite (the first attention output of SmolLM2-135M then asked for ten times the damping). Being
    symmetric, only its lower half is computed, in panels.

    Args:
        in_features: ``I``.
        device: where the sum is kept; batches must be there too.
    """

    def __init__(self, in_features: int, device: str | torch.device = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._whole = True  # the upper half is up to date
        panel = max(LEAST_PANEL, -(-in_features // PANELS))
        self._panels = [(at, min(at + panel, in_features)) for at in range(0, in_features, panel)]
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add activations ``[N, I]`` of any float type (multiplied in float32)."""
        x = _rows(x, self._sum.shape[0]).float()
        for first, last in self._panels:
            self._sum[first:last, :last].addmm_(x[:, first:last].t(), x[:, :last])
        self._whole = False
        self.rows += x.shape[0]

    @property
    def total(self) -> Tensor:
        """``X^T X`` as float32 ``[I, I]``: the sum itself, not a copy."""
        if not self._whole:
            for first, last in self._panels:
                self._sum[:first, first:last] = self._sum[first:last, :first].t()
            self._whole = True
        return self._sum

    def mean(self) -> Tensor:
        """``X^T X / N`` as float32 ``[I, I]``; zeros if no row was seen."""
        return self.total / max(self.rows, 1)


class DriftSum:
    """Streaming ``(X - X')^T X'``: how the inputs ``X'`` in the quantized model differ from those in the float model.

    Args:
        in_features: ``I``.
        device: where the sum is kept; batches must be there too.
        products: type of the factors of a product. In bfloat16 the difference (taken in float32) and the inputs are
            rounded, and each batch's product is; the sum over batches stays float32.
    """

    def __init__(
        self, in_features: int, device: str | torch.device = "cpu", products: torch.dtype = torch.float32
    ) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.products = products

    def add(self, exact: Tensor, x: Tensor) -> None:
        """Add activations ``[N, I]`` of the float model and of the quantized model, row by row the same token."""
        x = _rows(x, self.total.shape[0])
        _add_product(self.total, _rows(exact, self.total.shape[0]).float() - x.float(), x, self.products)


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
            x = x.float()
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
    return x.detach()


def _add_product(total: Tensor, left: Tensor, right: Tensor, products: torch.dtype) -> None:
    """``total += left^T right`` with factors of the type ``products``."""
    left, right = left.to(products), right.to(products)
    if products == total.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right

"""A linear layer whose inputs look like a language model's: correlated channels, a few of them much larger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ToyLayer:
    """``weight [O, I]``, calibration inputs ``[N, I]`` and inputs of the same kind that calibration never saw."""

    weight: Tensor
    seen: Tensor
    unseen: Tensor

    @property
    def hessian(self) -> Tensor:
        return self.seen.T @ self.seen

    def loss(self, approximation: Tensor) -> float:
        """Squared error of the outputs on unseen inputs, float64."""
        return float((self.unseen @ (approximation - self.weight).T).double().square().sum())

    def drift(self, approximation: Tensor) -> float:
        """Squared error of the weights."""
        return float((approximation - self.weight).double().square().sum())


def toy_layer(seed: int, rows: int = 32, columns: int = 96, correlated: bool = True) -> ToyLayer:
    """A layer with log-normal channel sizes; ``correlated`` mixes the channels before they are sized."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    size = torch.randn(columns, generator=generator).exp()
    mix = torch.eye(columns)
    if correlated:
        mix = 0.4 * mix + torch.randn(columns, columns, generator=generator) / columns**0.5
    seen, unseen = (torch.randn(12 * columns, columns, generator=generator) @ mix * size for _ in range(2))
    return ToyLayer(weight, seen, unseen)

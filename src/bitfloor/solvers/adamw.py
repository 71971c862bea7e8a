"""AdamW (arXiv 1711.05101) for parameters that are updated one at a time, with a state that can be stored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class AdamW:
    """The moments of named parameters.

        m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
        p <- p (1 - rate decay) - rate (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        betas: ``b1, b2``.
        eps: keeps the quotient finite.
        decay: decoupled weight decay.
        moments: name to ``m, v`` stacked, float32 ``[2, ...]``; made at the first step of a parameter.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.0
    moments: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, name: str, parameter: Tensor, grad: Tensor, rate: float, t: int) -> None:
        """Move a parameter in place.

        Args:
            name: of the parameter.
            parameter, grad: float32, equal shapes.
            rate: step size.
            t: number of this step, from 1.
        """
        if name not in self.moments:
            self.moments[name] = torch.zeros(2, *parameter.shape, device=parameter.device)
        mean, square = self.moments[name]
        first, second = self.betas
        mean.mul_(first).add_(grad, alpha=1.0 - first)
        square.mul_(second).addcmul_(grad, grad, value=1.0 - second)
        scaled = (square / (1.0 - second**t)).sqrt_().add_(self.eps)
        if self.decay:
            parameter.mul_(1.0 - rate * self.decay)
        parameter.addcdiv_(mean, scaled, value=-rate / (1.0 - first**t))

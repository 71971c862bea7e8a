"""Salience-determined bit allocation (SBA) of SliM-LLM: which groups of a matrix get a bit more, and which one less.

| symbol | meaning |
| --- | --- |
| ``N`` | the mean width |
| ``pi`` | groups by rising salience |
| ``p`` | number of groups promoted to ``N + 1``, the most salient ones, and of groups demoted to ``N - 1`` |
| ``W_b`` | the matrix rounded at width ``b`` |
| ``Y(p) [T, O]`` | outputs of the matrix with the widths of ``p`` on tokens ``X [T, I]``; ``Y`` of the float matrix |

    p* = argmin_p  sum_t KL( softmax Y(p)_t || softmax Y_t )       (arXiv 2405.14917, section 3.2; direction as in code)

Both ends move by one group at a time, so outputs need not be multiplied anew for every ``p``: they are sums over
groups, and one step changes two of them,

    Y(p) = Y(p - 1) + X_a (W_{N-1} - W_N)_a^T + X_c (W_{N+1} - W_N)_c^T          a = pi(p - 1),  c = pi(G - p)

which makes the whole sweep cost about two products of the matrix.

Deviations: the sweep may include ``p = 0`` (``uniform``), which the published one leaves out; with fewer than four
groups, where the published range is empty, ``p = 0`` is what remains; divergences are sums in float64 of float32 terms
by log-softmax, where the code clamps probabilities and keeps the sum in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS = 4096  # tokens treated at once
CACHED = 1 << 16  # outputs whose divergence is taken at once: what is made of them stays in a core's cache


def candidates(groups: int, uniform: bool) -> tuple[int, ...]:
    """The numbers ``p`` that are tried: up to less than half of the groups, as the published code has it.

    Args:
        groups: ``G``, at least 1.
        uniform: whether 0 is tried; it is in any case where nothing else is left.
    """
    published = tuple(range(1, groups // 2))
    return (0, *published) if uniform or not published else published


def widths_of(salience: Tensor, bits: int, p: int) -> tuple[int, ...]:
    """Width of every group: ``bits + 1`` for the ``p`` most salient, ``bits - 1`` for the ``p`` least."""
    order = torch.argsort(salience, stable=True).tolist()
    widths = [bits] * len(order)
    for low, high in zip(order[:p], order[len(order) - p :], strict=True):
        widths[low], widths[high] = bits - 1, bits + 1
    return tuple(widths)


class Sweep:
    """Divergences of all candidates of one matrix, summed over tokens as they come.

    Args:
        weight: ``[O, I]`` float32.
        rounded: the matrix at widths ``bits - 1``, ``bits`` and ``bits + 1``, each ``[O, I]`` float32; not called for
            widths that no candidate uses.
        salience: ``[G]``.
        group_size: columns of a group.
        tried: the candidates, see :func:`candidates`.
    """

    def __init__(
        self,
        weight: Tensor,
        rounded: Callable[[int], Tensor],
        salience: Tensor,
        group_size: int,
        tried: Sequence[int],
    ) -> None:
        self.weight = weight
        self.size = group_size
        self.tried = tuple(tried)
        self.salience = salience
        self.order = torch.argsort(salience, stable=True).tolist()
        self.middle = rounded(0)
        most = max(self.tried)
        self.down = rounded(-1) - self.middle if most else None
        self.up = rounded(1) - self.middle if most else None
        self.loss = dict.fromkeys(self.tried, 0.0)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add tokens ``[T, I]``. Products are float32, whatever the block around them computes in."""
        with torch.autocast(x.device.type, enabled=False):
            for rows in torch.split(x.float(), ROWS):
                self._add(rows)

    def _add(self, rows: Tensor) -> None:
        exact = rows @ self.weight.T
        found = rows @ self.middle.T
        for p in range(max(self.tried) + 1):
            if p:
                self._move(found, rows, p)
            if p in self.loss:
                self.loss[p] += divergence(found, exact)
        self.tokens += len(rows)

    def _move(self, found: Tensor, rows: Tensor, p: int) -> None:
        """From the outputs of ``p - 1`` to those of ``p``, in place."""
        assert self.down is not None and self.up is not None
        low, high = (slice(k * self.size, (k + 1) * self.size) for k in (self.order[p - 1], self.order[-p]))
        # One product for both: the outputs are read and written once.
        change = torch.cat([self.down[:, low], self.up[:, high]], 1)
        found.addmm_(torch.cat([rows[:, low], rows[:, high]], 1), change.T)

    def best(self) -> int:
        """The candidate with the lowest divergence, the smaller one of equals."""
        return min(self.tried, key=lambda p: (self.loss[p], p))


def divergence(outputs: Tensor, exact: Tensor) -> float:
    """``sum_t KL(softmax outputs_t || softmax exact_t)`` for outputs ``[T, O]`` float32.

    With ``m_t`` the largest output, ``e = exp(y - m)`` and ``n_t`` the largest of ``exact``:

        sum e (y - m - (exact - n)) / sum e - log sum e + log sum exp(exact - n)

    A few tokens at a time: what is made of them stays in a core's cache, which is most of the cost.
    """
    found = 0.0
    rows = max(1, CACHED // outputs.shape[1])
    for part, own in zip(torch.split(outputs, rows), torch.split(exact, rows), strict=True):
        above = part - part.amax(-1, keepdim=True)
        aim = own - own.amax(-1, keepdim=True)
        weights = above.exp()
        total = weights.sum(-1)
        inner = torch.linalg.vecdot(weights, above.sub_(aim))
        found += float((inner / total + (aim.exp_().sum(-1) / total).log()).sum(dtype=torch.float64))
    return found

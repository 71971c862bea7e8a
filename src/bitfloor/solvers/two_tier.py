"""PTQ1.61's storage of a matrix (arXiv 2502.13179): a few whole input channels at more bits, the others at one.

| symbol | here | meaning |
| --- | --- | --- |
| ``S, N`` | ``salient``, ``others`` | the channels at more bits, and the rest |
| ``q, s, z`` | codes, scale, zero-point | of the salient columns, a grid for each row |
| ``b`` | ``signs`` ``[O, |N|]`` | whether ``w >= mu``, 1 or 0; kept |
| ``mu`` | ``mean`` ``[O]`` | mean of a row over ``N``, zeros left out; kept |
| ``alpha`` | ``spread`` ``[O]`` | ``mean |w|`` of a row over ``N``, zeros left out; learned |
| ``r1 [O], r2 [|N|]`` | ``rows``, ``columns`` | factors of rows and columns, 1 at the start; learned |

    w_hat_ij = s_i (q_ij - z_i)                              j in S
    w_hat_ij = r1_i r2_j (alpha_i (2 b_ij - 1) + mu_i)       j in N            (equation 9, and the mean of the code)

What is stored of ``N`` is one bit a weight, ``scale = 2 r1 alpha`` and ``offset = r1 (mu - alpha)`` of every row, and
``r2`` as the channels' scale, each through its 16-bit type at every step, with gradient one:

    dL/dscale_i = sum_j g r2_j b      dL/doffset_i = sum_j g r2_j      dL/dr2_j = sum_i g (scale_i b + offset_i)

Deviations: the sign of exactly ``mu`` is plus (the code's sign of zero is zero, which one bit cannot hold). A row that
is one number over ``N`` (zero, above all) has ``alpha = 0`` for good: it is stored as that number, as in the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, stored, stored_scale
from bitfloor.core.packed import PackedWeight, Segment, pack_segment
from bitfloor.solvers.adamw import AdamW

BETAS = (0.9, 0.999)


@dataclass(frozen=True, eq=False)
class Binary:
    """The stored values of the binary columns.

    Args:
        codes: ``[O, |N|]`` uint8, 0 or 1.
        scale, offset: ``[O]`` float32, as stored.
        columns: ``[|N|]`` float32, as stored.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    columns: Tensor

    def dense(self) -> Tensor:
        """``[O, |N|]`` float32."""
        return (self.codes.float() * self.scale.unsqueeze(1)).add_(self.offset.unsqueeze(1)).mul_(self.columns)


@dataclass(frozen=True, eq=False)
class TwoTiers:
    """A matrix as it will be stored.

    Args:
        salient, others: int64, input channels of either part, rising; together all of them.
        codes: ``[O, |S|]`` uint8 of the salient part, and its ``grid``; None if there is none.
        binary: the other part; None if there is none.
    """

    salient: Tensor
    others: Tensor
    codes: Tensor | None
    grid: Grid | None
    binary: Binary | None

    def pack(self, dtype: torch.dtype) -> PackedWeight:
        """Two segments, the salient one first, and the order of the channels.

        The order of two parts is stored even where it is the natural one, so that bytes follow from shapes.

        Args:
            dtype: of the stored scales.
        """
        segments: list[Segment] = []
        if self.codes is not None and self.grid is not None:
            grid = self.grid
            assert grid.zero is not None
            zero: Tensor | int = grid.zero.to(torch.uint8)
            size, scale = grid.group_size, grid.scale.to(dtype)
            segments.append(pack_segment(self.codes, scale, bits=int(grid.bits[0]), group_size=size, zero=zero))
        if self.binary is not None:
            part = self.binary
            segments.append(
                pack_segment(
                    part.codes,
                    part.scale.to(dtype).unsqueeze(1),
                    bits=1,
                    group_size=part.codes.shape[1],
                    offset=part.offset.to(dtype).unsqueeze(1),
                    channel_scale=part.columns.to(dtype),
                    start=segments[-1].stop if segments else 0,
                )
            )
        order = torch.cat([self.salient, self.others])
        shape = (len(segments[0].scale), len(order))
        return PackedWeight(shape, tuple(segments), order if len(segments) > 1 else None)


def row_statistics(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``mu, alpha`` ``[O]`` of the binary columns ``[O, |N|]``: means of ``w`` and ``|w|`` over what is not zero.

    Of a row that is one number, that number and 0.
    """
    count = (weight != 0).sum(1).clamp_min(1)
    first = weight[:, :1]
    single = (weight == first).all(1)
    mean = torch.where(single, first.sum(1), weight.sum(1) / count)
    return mean, torch.where(single, 0.0, weight.abs().sum(1) / count)


class LearnedScales:
    """The learnable scales of one matrix, signs and codes as they are.

    Args:
        weight: ``[O, I]`` float32.
        salient, others: input channels of either part.
        codes, grid: of the salient part, None if there is none.
        dtype: of the stored scales.
        factor_share: step of the factors, of the step of ``alpha``.
    """

    def __init__(
        self,
        weight: Tensor,
        salient: Tensor,
        others: Tensor,
        codes: Tensor | None,
        grid: Grid | None,
        dtype: torch.dtype,
        factor_share: float = 2.0,
    ) -> None:
        self.shape, self.dtype, self.factor_share = weight.shape, dtype, factor_share
        self.salient, self.others, self.codes, self.grid = salient, others, codes, grid
        part = weight.index_select(1, others)
        self.mean, self.spread = row_statistics(part)
        self.alive = self.spread > 0
        self.signs = ((part >= self.mean.unsqueeze(1)) & self.alive.unsqueeze(1)).to(torch.uint8)
        self.rows = torch.ones_like(self.mean)
        self.columns = torch.ones(len(others), device=weight.device)
        self.adam, self.steps = AdamW(BETAS), 0

    def binary(self) -> Binary:
        """The binary part as stored at the present parameters."""
        scale = stored_scale(2.0 * self.rows * self.spread, self.dtype)
        offset = stored(self.rows * (self.mean - self.spread), self.dtype)
        return Binary(self.signs, scale, offset, stored(self.columns, self.dtype))

    def fake_quantized(self) -> Tensor:
        """``w_hat [O, I]`` float32 at the present parameters."""
        out = torch.empty(self.shape, device=self.mean.device)
        if self.codes is not None and self.grid is not None:
            out[:, self.salient] = decode(self.codes, self.grid)
        if len(self.others):
            out[:, self.others] = self.binary().dense()
        return out

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """One step of AdamW.

        Args:
            grad: ``[O, I]`` gradient of the loss with respect to :meth:`fake_quantized`.
            rate: step of ``alpha``; the factors take ``factor_share`` of it.
            range_rate: not used.
        """
        if not len(self.others):
            return
        self.steps += 1
        part, flow = self.binary(), grad.float().index_select(1, self.others)
        codes = part.codes.float()
        weighted = flow * part.columns
        scale, offset = (weighted * codes).sum(1), weighted.sum(1)
        moves = {
            "spread": self.rows * (2.0 * scale - offset) * self.alive,
            "rows": 2.0 * self.spread * scale + (self.mean - self.spread) * offset,
            "columns": (flow * (codes * part.scale.unsqueeze(1) + part.offset.unsqueeze(1))).sum(0),
        }
        for name, move in moves.items():
            own = rate if name == "spread" else self.factor_share * rate
            self.adam.step(name, getattr(self, name), move, own, self.steps)

    def snapshot(self) -> TwoTiers:
        """All that is stored at the present parameters."""
        binary = self.binary() if len(self.others) else None
        return TwoTiers(self.salient, self.others, self.codes, self.grid, binary)


def salient_count(columns: int, ratio: float, multiple: int) -> int:
    """How many channels are salient: the ratio of them, rounded down to whole multiples; all of them at ratio 1.

    Where that leaves none (a matrix narrower than a multiple by the ratio) they are not rounded to multiples.
    """
    count = columns if ratio >= 1.0 else int(ratio * columns + 1e-6)
    return count if ratio >= 1.0 or count < multiple else count // multiple * multiple

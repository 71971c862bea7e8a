"""Where the grid of each (row, group) lies: min-max, and a search that minimises the weighted error.

Symbols: ``w`` weights of one (row, group); ``h`` importance of each input channel, the diagonal of ``X^T X``;
``q`` codes; ``s`` scale; ``z`` zero-point; ``o`` offset; ``n = 2^b - 1``.

Min-max is the usual start of round-to-nearest: the range always includes zero. The search minimises
``sum_j h_j (w_j - s (q_j - z))^2`` over ``(s, z)``: a coarse grid of shrunken ranges with every sensible zero-point,
then alternation of rounding and closed-form least squares for ``s``, keeping only what lowers the error *after* the
scale went through its storage type. One-bit groups are two levels and alternate between nearest level and class means
instead. The diagonal weighting is the output error of one linear layer when its input
channels are uncorrelated (the objective of SignRoundV2's initial scales, arXiv 2512.04746, and of NeUQI, arXiv
2505.17595; the least-squares refit after the codes are known is ours).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfloor.core.affine import Grid, stored, stored_scale
from bitfloor.core.errors import InputError
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.ops.search import best_grid, fit_sums

CHUNK = 1 << 19  # weights treated at once: the working set of the search then stays within a few megabytes
COARSE = (1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57, 0.5, 0.42, 0.34, 0.25, 0.17)
ROUNDS = 4


def group_bits(spec: QuantSpec, groups: int, bits: Tensor | None = None) -> Tensor:
    """Widths ``[G]`` int64: those given, or the spec's."""
    if bits is None:
        bits = torch.tensor(spec.widths or (spec.bits,) * groups)
    if bits.shape != (groups,):
        raise InputError(f"bits per group has {tuple(bits.shape)} entries but the matrix has {groups} groups.")
    unknown = set(bits.tolist()) - set(BITS)
    if unknown:
        raise InputError(f"bits per group holds {min(unknown)}; use {', '.join(map(str, BITS))}.")
    return bits.to(torch.int64)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """``[..., I]`` as ``[..., G, g]``, a short last group padded with zeros."""
    columns = weight.shape[-1]
    groups = -(-columns // group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - columns))
    return padded.reshape(*weight.shape[:-1], groups, group_size)


def minmax_grid(weight: Tensor, spec: QuantSpec, bits: Tensor | None = None) -> Grid:
    """Round-to-nearest's grid: the range of each group, extended to include zero.

    Symmetric grids are full range: the side with the larger magnitude lands on code 0, so the scale is negative when
    that side is positive (SignRound, arXiv 2309.05516, as its code does it). One-bit groups are
    ``mean +- mean|w - mean|``, the least-squares spread of a sign code around the mean; ``+- mean|w|`` where centred.

    Args:
        weight: ``[O, I]`` float32.
        spec: width, grouping, symmetry, storage type.
        bits: ``[G]`` widths overriding ``spec.bits``.
    """
    return search_grid(weight, None, spec, bits)


def search_grid(weight: Tensor, importance: Tensor | None, spec: QuantSpec, bits: Tensor | None = None) -> Grid:
    """The grid that minimises the importance-weighted squared error of rounding.

    Args:
        weight: ``[O, I]`` float32.
        importance: ``[I]`` non-negative, any scale (a group whose importances are all zero counts its channels alike);
            None gives the min-max grid without a search.
        spec: width, grouping, symmetry, storage type.
        bits: ``[G]`` widths overriding ``spec.bits``.

    Returns:
        a grid on the weight's device.
    """
    rows, columns = weight.shape
    size = spec.columns_per_group(columns)
    dtype = getattr(torch, spec.scale_dtype)
    widths = group_bits(spec, -(-columns // size), bits).to(weight.device)
    one_bit = not spec.centred and bool((widths == 1).any())  # with an offset
    valid = grouped(torch.ones(columns, device=weight.device), size)
    weights = valid if importance is None else normalised(grouped(importance.float(), size), valid)
    counted = weights.flatten()[:columns].contiguous()
    scales, zeros, offsets = [], [], []
    for part in torch.split(weight, max(1, CHUNK // columns)):
        groups = grouped(part.float(), size)
        scale, zero = _minmax(groups, widths, spec.symmetric, dtype)
        if spec.centred:
            own = _centred(groups, valid, widths, dtype)
            scale, zero = (torch.where(widths <= spec.centred, *pair) for pair in zip(own, (scale, zero), strict=True))
        if importance is not None:
            dense = part.float().contiguous()
            scale, zero = _search(dense, counted, widths, (scale, zero), spec)
        if one_bit:
            levels, low = _two_levels(groups, valid, None if importance is None else weights, dtype)
            scale = torch.where(widths == 1, levels, scale)
            offsets.append(low)
        scales.append(scale)
        zeros.append(zero)
    only = one_bit and bool((widths == 1).all())
    return Grid(
        torch.cat(scales),
        None if only else torch.cat(zeros),
        torch.cat(offsets) if one_bit else None,
        widths,
        size,
        constant_zero=spec.symmetric and not only,
        scale_dtype=dtype,
    )


def tempered(importance: Tensor, exponent: float) -> Tensor:
    """``importance ** exponent``: between the diagonal of the Hessian (1) and counting channels alike (0).

    A handful of tokens (the first of a sequence, above all) make some channels of a few layers thousands of times
    larger than the rest. Weighted in full, the grid of their whole group is fitted to one column.
    """
    return importance.clamp_min(0.0).pow(exponent)


def normalised(importance: Tensor, valid: Tensor) -> Tensor:
    """Importances ``[G, g]`` with mean one inside each group; dead groups count their channels alike."""
    importance = importance * valid
    mean = importance.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)
    usable = torch.isfinite(mean) & (mean > 0)
    return torch.where(usable, importance / torch.where(usable, mean, 1.0), valid)


def _centred(groups: Tensor, valid: Tensor, widths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero-point ``[O, G]`` of levels in pairs around zero: the outer ones on the largest magnitude.

    Two levels lie at the mean magnitude, which is the best there is.
    """
    sizes = groups.abs()
    half = ((torch.ones_like(widths) << widths).float() - 1) / 2
    reach = torch.where(widths == 1, sizes.sum(-1) / valid.sum(-1), sizes.amax(-1))
    scale = torch.where(reach == 0, torch.ones_like(reach), reach) / half
    return stored_scale(scale, dtype), half.expand_as(scale).contiguous()


def _minmax(groups: Tensor, widths: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero-point ``[O, G]`` of the min-max grid for groups ``[O, G, g]``."""
    low = groups.amin(-1).clamp_max(0.0)
    high = groups.amax(-1).clamp_min(0.0)
    if symmetric:
        half = (torch.ones_like(widths) << (widths - 1)).float()
        largest = torch.where(-low > high, -low, -high)  # negative when the positive side is larger
        scale = torch.where(largest == 0, torch.ones_like(largest), largest) / half
        return stored_scale(scale, dtype), half.expand_as(scale).contiguous()
    top = (torch.ones_like(widths) << widths).float() - 1
    scale = stored_scale(torch.where(high == low, torch.ones_like(low), (high - low) / top), dtype)
    return scale, torch.round(-low / scale).clamp_min(0.0).minimum(top)


def _search(
    weight: Tensor,
    importance: Tensor,
    widths: Tensor,
    start: tuple[Tensor, Tensor],
    spec: QuantSpec,
) -> tuple[Tensor, Tensor]:
    """Improve ``start`` on every group of dense float32 weights; the result is never worse than it."""
    dtype, size = getattr(torch, spec.scale_dtype), spec.columns_per_group(weight.shape[1])
    groups = grouped(weight, size)
    tops = (torch.ones_like(widths) << widths).float() - 1
    centred = widths <= spec.centred
    scale, zero = (part.clone(memory_format=torch.contiguous_format) for part in start)
    best = (scale, zero, torch.full_like(scale, torch.inf))

    def look(*candidates: tuple[Tensor, Tensor]) -> None:
        scales, zeros = (torch.stack(part) for part in zip(*candidates, strict=True))
        best_grid(weight, importance, tops, (scales, zeros), best, size)

    look(start, *_candidates(groups, widths, start, spec, dtype))
    for _ in range(ROUNDS):
        above, below = fit_sums(weight, importance, tops, scale, zero, size)
        fitted = stored_scale(torch.where(below > 0, above / below.clamp_min(1e-30), scale), dtype)
        steps = (0.0,) if spec.symmetric or bool(centred.all()) else (0.0, -1.0, 1.0)
        look(*((fitted, (zero + torch.where(centred, 0.0, step)).clamp_min(0.0).minimum(tops)) for step in steps))
    return scale, zero


def _candidates(
    groups: Tensor, widths: Tensor, start: tuple[Tensor, Tensor], spec: QuantSpec, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Shrunken ranges: the same factor on both ends, and for asymmetric grids one end cut harder than the other."""
    scale, zero = start
    centred = widths <= spec.centred
    if spec.symmetric or bool(centred.all()):
        plus = [(stored_scale(scale * factor, dtype), zero) for factor in COARSE]
        if spec.centred:  # the other sign is the same levels
            return plus
        # Both signs: which side gets the extra level matters most at two bits.
        return plus + [(stored_scale(-scale * factor, dtype), zero) for factor in COARSE]
    low = groups.amin(-1).clamp_max(0.0)
    high = groups.amax(-1).clamp_min(0.0)
    top = (torch.ones_like(widths) << widths).float() - 1
    out = []
    for factor in COARSE:
        for below, above in ((1.0, 1.0), (0.75, 1.0), (1.0, 0.75)):
            cut_low, cut_high = low * (factor * below), high * (factor * above)
            span = cut_high - cut_low
            cut = stored_scale(torch.where(span > 0, span, torch.ones_like(span)) / top, dtype)
            found = (cut, torch.round(-cut_low / cut).clamp_min(0.0).minimum(top))
            if spec.centred:
                own = stored_scale(scale * factor, dtype), zero
                found = torch.where(centred, own[0], found[0]), torch.where(centred, own[1], found[1])
            out.append(found)
    return out


def _two_levels(groups: Tensor, valid: Tensor, weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and offset ``[O, G]`` of one-bit groups: ``mean +- mean|w - mean|``.

    With importances that is only the start: levels around the weighted mean, then the weighted means of the two
    classes, are taken where they lower the weighted error of the stored levels.
    """
    scale, low = levels(*mean_and_spread(groups, valid), dtype)
    if weights is None:
        return scale, low
    best, codes = _level_error(groups, weights, scale, low)
    trial = levels(*mean_and_spread(groups, weights), dtype)
    for _ in range(ROUNDS):
        error, nearest = _level_error(groups, weights, *trial)
        better = error < best
        best, scale, low = (
            torch.where(better, new, old) for new, old in ((error, best), (trial[0], scale), (trial[1], low))
        )
        codes = torch.where(better.unsqueeze(-1), nearest, codes)
        trial = _class_means(groups, weights, codes, (scale, low), dtype)
    return scale, low


def mean_and_spread(groups: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of groups ``[..., g]``, and weighted mean distance from it: ``[...]`` each."""
    total = weights.sum(-1)
    mean = (groups * weights).sum(-1) / total
    return mean, ((groups - mean.unsqueeze(-1)).abs() * weights).sum(-1) / total


def levels(mean: Tensor, spread: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and offset, as stored, of the two levels ``mean +- spread``."""
    return stored_scale(2.0 * spread, dtype), stored(mean - spread, dtype)


def _level_error(groups: Tensor, weights: Tensor, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted error ``[O, G]`` of rounding to the nearer of two levels, and the codes ``[O, G, g]``, 0 or 1."""
    above = groups - low.unsqueeze(-1)
    codes = torch.round(above / scale.unsqueeze(-1)).clamp_(0.0, 1.0)
    return (above - codes * scale.unsqueeze(-1)).square_().mul_(weights).sum(-1), codes


def _class_means(
    groups: Tensor, weights: Tensor, codes: Tensor, grid: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The best two levels for fixed codes; the old ones where a class is empty."""
    ones, total = (weights * codes).sum(-1), weights.sum(-1)
    upper = (weights * codes * groups).sum(-1)
    lower = (weights * groups).sum(-1) - upper
    both = (ones > 0) & (ones < total)
    low = stored(lower / torch.where(both, total - ones, 1.0), dtype)
    scale = stored_scale(upper / torch.where(both, ones, 1.0) - low, dtype)
    return torch.where(both, scale, grid[0]), torch.where(both, low, grid[1])

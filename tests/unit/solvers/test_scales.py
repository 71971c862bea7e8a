"""Scales as parameters: the start is the stored matrix, and the gradient is automatic differentiation's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packing import random_segment
from torch import Tensor

from bitfloor.core.affine import encode, pack
from bitfloor.core.basis import basis_of, restored
from bitfloor.core.bitpack import blocked
from bitfloor.core.channels import pack_order
from bitfloor.core.packed import PackedWeight, Segment, column_index, dequantize, expand_groups, segment_codes
from bitfloor.core.rotation import rotate
from bitfloor.core.spec import QuantSpec
from bitfloor.formats import native
from bitfloor.solvers.adamw import AdamW
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.scales import TunedScales, tunable

ROWS = 6


def packed(spec: QuantSpec, columns: int = 20) -> PackedWeight:
    weight = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0))
    grid = minmax_grid(weight, spec)
    return pack(encode(weight, grid), grid, basis_of(spec))


def pieces(order: list[int] | None, unit: int, *parts: dict[str, Any], columns: int = 20) -> PackedWeight:
    """Random segments one behind the other, as no method packs them."""
    generator = torch.Generator().manual_seed(0)
    segments: list[Segment] = []
    for part in parts:
        start = segments[-1].stop if segments else 0
        segments.append(random_segment(generator, ROWS, start=start, **part))
    index = None if order is None else torch.tensor(order)
    return PackedWeight((ROWS, columns), tuple(segments), index, unit)


UNIFORM = [
    QuantSpec(2, 8),
    QuantSpec(3, 7, True),
    QuantSpec(8, -1),
    QuantSpec(4, 8, False, "bfloat16"),
    QuantSpec(3, 8, rotation=8),
    QuantSpec(1, 8),
    QuantSpec(1, -1, False, "bfloat16", 4),
]
# The short last group lies in the last, the first, and the middle segment.
MIXED = [
    QuantSpec(2, 8, widths=(1, 2, 3)),
    QuantSpec(2, 8, widths=(2, 8, 1)),
    QuantSpec(2, 8, widths=(3, 1, 2), rotation=8),
    QuantSpec(2, 6, True, widths=(1, 3, 1, 2)),
    QuantSpec(2, 6, False, "bfloat16", 4, (8, 6, 5, 6)),
    QuantSpec(2, 8, rotation=8, widths=(3, 1, 2), channels=pack_order(list(reversed(range(20))))),
]
THREE = {"columns": 7, "bits": 3, "group_size": 4}
ODD = [
    # Single columns in any order; another group size, and an offset of more than one bit.
    pieces(torch.randperm(20).tolist(), 1, THREE, {"columns": 13, "bits": 2, "group_size": 5, "zero": "offset"}),
    # Of units 0 to 3, of which the last has two columns, one is stored twice, and one not at all.
    pieces([3, 1, 1], 6, THREE, {"columns": 7, "bits": 1, "group_size": 3, "zero": "offset"}),
    pieces(None, 1, {**THREE, "zero": 4}, {"columns": 13, "bits": 1, "group_size": 16, "zero": "offset"}),
]
WEIGHTS = [*(pytest.param(packed(spec), id=str(spec)) for spec in (*UNIFORM, *MIXED)), *ODD]


def moved(weight: PackedWeight) -> TunedScales:
    """Its scales after a step in some direction."""
    scales = TunedScales(weight)
    scales.factor.add_(torch.randn(scales.factor.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    return scales


def reference(weight: PackedWeight, factor: Tensor) -> Tensor:
    """The matrix at factors ``[O, G]``, nothing rounded, for automatic differentiation."""
    parts, at = [], 0
    for segment in weight.segments:
        start = segment.scale.float()
        scale = start * factor[:, at : at + segment.groups]
        if segment.offset is not None:
            middle = (2**segment.bits - 1) / 2
            shift = segment.offset.float() + start * middle - scale * middle
        else:
            zero = segment.zero if isinstance(segment.zero, Tensor) else torch.tensor(float(segment.zero or 0))
            shift = -zero.float() * scale
        spread = [expand_groups(values, segment.group_size, segment.columns) for values in (scale, shift)]
        parts.append(segment_codes(segment, ROWS).float() * spread[0] + spread[1])
        at += segment.groups
    stored, index = torch.cat(parts, dim=1), column_index(weight)
    if index is not None:
        stored = torch.zeros(weight.shape).index_add(1, index, stored)
    return restored(rotate(stored, weight.rotation), weight.channels)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_start_is_the_stored_matrix_and_the_gradient_is_exact(weight: PackedWeight) -> None:
    scales = TunedScales(weight)
    assert tunable(weight) and torch.equal(scales.dense(), dequantize(weight))
    factor = torch.ones_like(scales.factor, requires_grad=True)
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward(reference(weight, factor), grad)
    assert factor.grad is not None
    # Sums of a group in another order, in float32.
    torch.testing.assert_close(scales.gradient(grad), factor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_what_is_learnt_is_what_is_stored(weight: PackedWeight) -> None:
    scales = moved(weight)
    before = native.encode("m", weight)
    after = {f"m.{part}": blocked(values) for part, values in scales.tensors().items()}
    assert {name for name in before if name.endswith((".scale", ".offset"))} == after.keys()
    assert all(after[name].dtype == before[name].dtype for name in after)
    again = native.decode("m", native.layout(weight), {**before, **after}.__getitem__)
    assert torch.equal(scales.dense(), dequantize(again))
    # Half a unit in the last place of scale and offset, in every weight; where columns are mixed or stored twice, up to
    # the square root of eight of them come together.
    rough = 2.0**-8 if scales.dtype is torch.bfloat16 else 2.0**-11
    largest = 0.0
    for segment, own in zip(weight.segments, scales.segments, strict=True):
        scale, low = own.values()
        lowest = 0.0 if low is None else float(low.abs().max())
        largest = max(largest, float(scale.abs().max()) * 2**segment.bits + lowest)
    torch.testing.assert_close(scales.dense(), reference(weight, scales.factor), rtol=0.0, atol=4 * rough * largest)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_codes_take_a_byte_and_groups_what_is_planned(weight: PackedWeight) -> None:
    scales = TunedScales(weight)
    held = [scales.factor, *(scales.places or ())]
    tensors = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    for segment, own in zip(weight.segments, scales.segments, strict=True):
        wide = 2 if segment.bits == 8 else 1
        assert own.codes.untyped_storage().nbytes() == wide * ROWS * segment.groups * segment.group_size
        tensors |= {t.data_ptr(): t.untyped_storage().nbytes() for t in (own.start, own.low) if t is not None}
    # Factor, scale and offset of a group; where a column belongs.
    stored = sum(segment.columns for segment in weight.segments)
    assert sum(tensors.values()) <= 8 * scales.factor.numel() + 4 * stored


def test_one_bit_groups_stay_where_they_are() -> None:
    weight = packed(QuantSpec(1, 8))
    scales = TunedScales(weight)
    start = scales.tensors()
    scales.factor.mul_(1.5)
    scale, offset = (scales.tensors()[part].float() for part in ("scale", "offset"))
    torch.testing.assert_close(scale, 1.5 * start["scale"].float(), rtol=2.0**-11, atol=0.0)
    middle = start["offset"].float() + start["scale"].float() / 2
    # Offsets are below 4: float16 rounds them by at most 2^-10.
    torch.testing.assert_close(offset + scale / 2, middle, rtol=0.0, atol=2.0**-10)


def test_a_small_offset_beside_a_large_scale_is_not_lost() -> None:
    weight = packed(QuantSpec(1, 8))
    segment = weight.segments[0]
    segment.scale.fill_(30000.0)
    segment.offset.fill_(2.0**-20)  # type: ignore[union-attr]
    assert torch.equal(TunedScales(weight).dense(), dequantize(weight))


def test_matrices_with_channel_scales_keep_their_scales() -> None:
    weight = pieces(None, 1, THREE, {"columns": 13, "bits": 2, "group_size": 8, "channel_scale": True})
    assert not tunable(weight)
    with pytest.raises(ValueError, match="channel scales"):
        TunedScales(weight)


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(5, 3, generator=generator)
    theirs = ours.clone().requires_grad_()
    mine = AdamW(decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for t in range(1, 12):
        grad = torch.randn(5, 3, generator=generator)
        rate = 0.1 / t
        mine.step("p", ours, grad, rate, t)
        other.param_groups[0]["lr"] = rate
        theirs.grad = grad
        other.step()
        torch.testing.assert_close(ours, theirs.detach())

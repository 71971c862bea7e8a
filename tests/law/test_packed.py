"""What holds for every packed weight: linear in its scales, indifferent to how its columns are stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfloor.core.packed import PackedWeight, Segment, bits_per_weight, dequantize, nbytes, pack_segment
from bitfloor.core.spec import BITS

LAW = settings(max_examples=50, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**16)


@st.composite
def segments(draw: st.DrawFn, rows: int, start: int = 0) -> Segment:
    bits, columns, group_size = draw(st.sampled_from(BITS)), draw(st.integers(1, 70)), draw(st.integers(1, 80))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    groups = -(-columns // group_size)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)

    kind = draw(st.sampled_from(["packed", "constant", "offset"]))
    return pack_segment(
        codes(rows, columns),
        values(rows, groups),
        bits=bits,
        group_size=group_size,
        zero=codes(rows, groups) if kind == "packed" else 1 << (bits - 1) if kind == "constant" else None,
        offset=values(rows, groups) if kind == "offset" else None,
        channel_scale=values(columns) if draw(st.booleans()) else None,
        start=start,
    )


@st.composite
def weights(draw: st.DrawFn) -> PackedWeight:
    rows = draw(st.integers(1, 20))
    parts: list[Segment] = []
    for _ in range(draw(st.integers(1, 3))):
        parts.append(draw(segments(rows, parts[-1].stop if parts else 0)))
    return PackedWeight((rows, parts[-1].stop), tuple(parts))


@LAW
@given(weights(), SEEDS)
def test_a_permuted_order_permutes_the_columns(weight: PackedWeight, seed: int) -> None:
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(dequantize(replace(weight, order=order))[:, order], dequantize(weight))
    natural = torch.arange(columns)
    assert torch.equal(dequantize(replace(weight, order=natural)), dequantize(weight))


@LAW
@given(weights(), SEEDS, st.integers(1, 5))
def test_an_order_may_drop_channels_and_repeat_channels(weight: PackedWeight, seed: int, spare: int) -> None:
    stored = weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(0, stored + spare, (stored,), generator=generator)
    wider = PackedWeight((weight.shape[0], stored + spare), weight.segments, order)
    # As a matrix: stored columns times the 0/1 matrix that sends them to their channels. Exact enough in float64.
    sends = torch.zeros(stored, stored + spare, dtype=torch.float64)
    sends[torch.arange(stored), order] = 1
    expected = dequantize(weight).double() @ sends
    # Float32 sums of the few planes that met in one channel.
    torch.testing.assert_close(dequantize(wider).double(), expected, rtol=1e-6, atol=1e-3)
    left_out = torch.ones(stored + spare, dtype=torch.bool)
    left_out[order] = False
    assert dequantize(wider)[:, left_out].abs().sum() == 0


@LAW
@given(weights(), st.sampled_from([-1.0, 2.0, -0.5]))
def test_scaling_every_scale_and_offset_scales_the_weight(weight: PackedWeight, factor: float) -> None:
    def scaled(segment: Segment) -> Segment:
        offset = None if segment.offset is None else segment.offset * factor
        return replace(segment, scale=segment.scale * factor, offset=offset)

    # A power of two is exact in every type (normal deviates are far from the ends of float16).
    other = replace(weight, segments=tuple(map(scaled, weight.segments)))
    assert torch.equal(dequantize(other), dequantize(weight) * factor)


@LAW
@given(weights())
def test_bytes_cover_the_codes_and_count_every_part(weight: PackedWeight) -> None:
    parts = nbytes(weight)
    codes = sum(segment.columns * weight.shape[0] * segment.bits for segment in weight.segments) / 8
    assert parts["codes"] >= codes
    assert parts["codes"] % 64 == 0
    assert bits_per_weight(weight) == 8 * sum(parts.values()) / (weight.shape[0] * weight.shape[1])
    ordered = replace(weight, order=torch.arange(weight.shape[1]))
    assert nbytes(ordered)["order"] >= weight.shape[1]
    assert {name: size for name, size in nbytes(ordered).items() if name != "order"} == {
        name: size for name, size in parts.items() if name != "order"
    }

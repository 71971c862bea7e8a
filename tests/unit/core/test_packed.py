"""PackedWeight: what it stands for, element by element, and what it costs, byte by byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfloor.core.packed import (
    PackedWeight,
    Segment,
    bits_per_weight,
    column_index,
    dequantize,
    expand_groups,
    nbytes,
    order_dtype,
    pack_segment,
    segment_codes,
    segment_offset,
)
from bitfloor.core.spec import BITS


def random_segment(
    rows: int,
    columns: int,
    *,
    bits: int,
    group_size: int,
    kind: str,
    channel: bool = False,
    start: int = 0,
    dtype: torch.dtype = torch.float16,
) -> tuple[Segment, Tensor]:
    """A segment of random codes and signed scales, and its codes. ``kind``: "packed", "constant" or "offset"."""
    generator = torch.Generator().manual_seed(1000 * bits + columns + start)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(rows, groups, generator=generator).to(dtype)
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    segment = pack_segment(
        codes,
        scale,
        bits=bits,
        group_size=group_size,
        zero=zero if kind == "packed" else 1 << (bits - 1) if kind == "constant" else None,
        offset=torch.randn(rows, groups, generator=generator).to(dtype) if kind == "offset" else None,
        channel_scale=(torch.rand(columns, generator=generator) + 0.5).to(dtype) if channel else None,
        start=start,
    )
    return segment, codes


def element(segment: Segment, codes: Tensor, row: int, column: int) -> np.float32:
    """The formula of the value type for one weight, operation by operation in float32."""
    group = column // segment.group_size
    scale = np.float32(float(segment.scale[row, group]))
    if segment.offset is not None:
        offset = np.float32(float(segment.offset[row, group]))
    else:
        zero = int(segment.zero[row, group]) if isinstance(segment.zero, Tensor) else segment.zero
        assert zero is not None
        offset = -np.float32(zero) * scale
    value = np.float32(int(codes[row, column])) * scale + offset
    if segment.channel_scale is not None:
        value = value * np.float32(float(segment.channel_scale[column]))
    return np.float32(value)


def by_formula(weight: PackedWeight, codes: list[Tensor]) -> list[list[float]]:
    """The dense matrix by explicit loops over stored columns."""
    rows, columns = weight.shape
    dense = np.zeros((rows, columns), np.float32)
    index = column_index(weight)
    for segment, own in zip(weight.segments, codes, strict=True):
        for column in range(segment.columns):
            stored = segment.start + column
            channel = stored if index is None else int(index[stored])
            for row in range(rows):
                dense[row, channel] += element(segment, own, row, column)
    return [[float(value) for value in line] for line in dense]


@pytest.mark.parametrize("kind", ["packed", "constant", "offset"])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_follows_the_formula_with_a_short_last_group(bits: int, kind: str, channel: bool) -> None:
    segment, codes = random_segment(5, 23, bits=bits, group_size=8, kind=kind, channel=channel)
    weight = PackedWeight((5, 23), (segment,))
    assert segment.groups == 3
    assert torch.equal(segment_codes(segment, 5), codes)
    assert dequantize(weight).tolist() == by_formula(weight, [codes])


def test_segments_of_different_width_grouping_and_form_lie_side_by_side() -> None:
    parts = [
        random_segment(18, 10, bits=1, group_size=5, kind="offset"),
        random_segment(18, 33, bits=2, group_size=16, kind="packed", start=10),
        random_segment(18, 7, bits=4, group_size=7, kind="constant", channel=True, start=43),
    ]
    weight = PackedWeight((18, 50), tuple(segment for segment, _ in parts))
    assert dequantize(weight).tolist() == by_formula(weight, [codes for _, codes in parts])


def test_bfloat16_scales_and_offsets() -> None:
    segment, codes = random_segment(4, 12, bits=3, group_size=5, kind="offset", channel=True, dtype=torch.bfloat16)
    weight = PackedWeight((4, 12), (segment,))
    assert dequantize(weight).tolist() == by_formula(weight, [codes])


def test_an_order_by_channel_scatters_the_stored_columns() -> None:
    segment, codes = random_segment(6, 9, bits=3, group_size=4, kind="packed")
    order = torch.tensor([4, 0, 8, 1, 7, 2, 6, 3, 5])
    weight = PackedWeight((6, 9), (segment,), order)
    natural = dequantize(PackedWeight((6, 9), (segment,)))
    assert torch.equal(dequantize(weight)[:, order], natural)
    assert dequantize(weight).tolist() == by_formula(weight, [codes])


def test_a_channel_left_out_of_the_order_has_weight_zero() -> None:
    segment, codes = random_segment(6, 4, bits=4, group_size=4, kind="constant")
    weight = PackedWeight((6, 7), (segment,), torch.tensor([6, 1, 3, 0]))
    dense = dequantize(weight)
    assert dense[:, [2, 4, 5]].abs().max() == 0
    assert dense.tolist() == by_formula(weight, [codes])


def test_planes_of_a_repeated_channel_add_up() -> None:
    first, first_codes = random_segment(6, 5, bits=2, group_size=5, kind="packed")
    second, second_codes = random_segment(6, 2, bits=1, group_size=2, kind="offset", start=5)
    weight = PackedWeight((6, 5), (first, second), torch.tensor([0, 1, 2, 3, 4, 3, 1]))
    base = dequantize(PackedWeight((6, 5), (first,)))
    residual = dequantize(PackedWeight((6, 2), (replace(second, start=0, stop=2),)))
    expected = base.clone()
    expected[:, 3] += residual[:, 0]
    expected[:, 1] += residual[:, 1]
    assert torch.equal(dequantize(weight), expected)
    assert dequantize(weight).tolist() == by_formula(weight, [first_codes, second_codes])


def test_an_order_of_groups_cuts_the_group_at_the_end_of_the_row() -> None:
    # 11 channels in groups of 4: group 2 holds channels 8, 9, 10 only, here stored between the others.
    segment, codes = random_segment(3, 11, bits=5, group_size=4, kind="packed")
    weight = PackedWeight((3, 11), (segment,), torch.tensor([1, 2, 0]), order_unit=4)
    index = column_index(weight)
    assert index is not None
    assert index.tolist() == [4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3]
    assert dequantize(weight).tolist() == by_formula(weight, [codes])


def test_natural_order_has_no_index() -> None:
    segment, _ = random_segment(3, 4, bits=2, group_size=4, kind="packed")
    assert column_index(PackedWeight((3, 4), (segment,))) is None


def test_the_result_is_cast_once_at_the_end() -> None:
    segment, _ = random_segment(7, 40, bits=3, group_size=16, kind="offset", channel=True)
    weight = PackedWeight((7, 40), (segment,))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize(weight, dtype), dequantize(weight).to(dtype))


def test_dequantize_leaves_the_stored_tensors_alone() -> None:
    segment, codes = random_segment(7, 40, bits=2, group_size=16, kind="offset", channel=True)
    tensors = [segment.codes, segment.scale, segment.offset, segment.channel_scale]
    before = [tensor.clone() for tensor in tensors if tensor is not None]
    dequantize(PackedWeight((7, 40), (segment,)))
    after = [tensor for tensor in tensors if tensor is not None]
    assert len(after) == 4
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_negative_scale_mirrors_the_grid() -> None:
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    segment = pack_segment(codes, torch.tensor([[-0.5]], dtype=torch.float16), bits=2, group_size=4, zero=2)
    assert dequantize(PackedWeight((1, 4), (segment,))).tolist() == [[1.0, 0.5, 0.0, -0.5]]
    assert segment_offset(segment).tolist() == [[1.0]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_point_form_is_exact_in_float32(bits: int, dtype: torch.dtype) -> None:
    # (code - zero) * scale needs 9 + 11 bits of mantissa; every code meets every zero-point, scales over 32 binades.
    count = 1 << bits
    generator = torch.Generator().manual_seed(bits)
    codes = torch.arange(count, dtype=torch.uint8).repeat(count, 1)
    zero = torch.arange(count, dtype=torch.uint8).unsqueeze(1)
    exponent = torch.randint(-24, 8, (count, 1), generator=generator)
    scale = (torch.randn(count, 1, generator=generator) * torch.exp2(exponent.float())).to(dtype)
    segment = pack_segment(codes, scale, bits=bits, group_size=count, zero=zero)
    exact = (codes.double() - zero.double()) * scale.double()
    assert torch.equal(dequantize(PackedWeight((count, count), (segment,))).double(), exact)


def test_zero_weight_is_represented_exactly_at_the_zero_point() -> None:
    codes = torch.full((3, 8), 5, dtype=torch.uint8)
    scale = torch.tensor([[0.1], [-3.3], [1e-7]], dtype=torch.float16)
    segment = pack_segment(codes, scale, bits=3, group_size=8, zero=torch.full((3, 1), 5, dtype=torch.uint8))
    assert dequantize(PackedWeight((3, 8), (segment,))).abs().max() == 0


def test_expand_groups_cuts_the_last_group() -> None:
    assert expand_groups(torch.tensor([[1, 2], [3, 4]]), 3, 4).tolist() == [[1, 1, 1, 2], [3, 3, 3, 4]]


def test_bytes_of_one_segment_by_hand() -> None:
    # 40 rows: 3 row blocks. 100 columns: 4 tiles, 4 groups of 32 (the last short).
    segment, _ = random_segment(40, 100, bits=3, group_size=32, kind="packed")
    weight = PackedWeight((40, 100), (segment,))
    assert nbytes(weight) == {
        "codes": 3 * 4 * 64 * 3,
        "scale": 3 * 16 * 4 * 2,
        "zero": 3 * 4 * 2 * 3,
        "offset": 0,
        "channel_scale": 0,
        "order": 0,
        "channels": 0,
    }
    assert bits_per_weight(weight) == 8 * (2304 + 384 + 72) / 4000


def test_an_aligned_matrix_costs_its_bits_plus_side_values_and_nothing_else() -> None:
    # 2 bits, group 64: 16/64 for the scale and 2/64 for the zero-point.
    segment, _ = random_segment(32, 128, bits=2, group_size=64, kind="packed")
    assert bits_per_weight(PackedWeight((32, 128), (segment,))) == 2 + 16 / 64 + 2 / 64


def test_bytes_of_all_parts_by_hand() -> None:
    # As PTQ1.61 stores it: 4-bit salient channels and 1-bit rest with offsets and channel scales, and an order.
    salient, _ = random_segment(20, 8, bits=4, group_size=8, kind="constant")
    rest, _ = random_segment(20, 72, bits=1, group_size=72, kind="offset", channel=True, start=8)
    weight = PackedWeight((20, 80), (salient, rest), torch.randperm(80, generator=torch.Generator().manual_seed(0)))
    weight = replace(weight, channels=torch.arange(80))
    assert nbytes(weight) == {
        "codes": 2 * 1 * 64 * 4 + 2 * 3 * 64 * 1,
        "scale": 2 * 16 * 1 * 2 + 2 * 16 * 1 * 2,
        "zero": 0,
        "offset": 2 * 16 * 1 * 2,
        "channel_scale": 72 * 2,
        "order": 80 * 1,
        "channels": 80 * 1,
    }


@pytest.mark.parametrize(
    ("columns", "unit", "dtype"),
    [
        (256, 1, torch.uint8),
        (257, 1, torch.uint16),
        (65536, 1, torch.uint16),
        (65537, 1, torch.uint32),
        (65537, 128, torch.uint16),
        (8192, 32, torch.uint8),
    ],
)
def test_the_order_takes_the_smallest_type_that_holds_its_largest_entry(
    columns: int, unit: int, dtype: torch.dtype
) -> None:
    entries = -(-columns // unit)
    weight = PackedWeight((1, columns), (), torch.arange(entries), unit)
    assert order_dtype(weight) == dtype
    assert entries - 1 <= torch.iinfo(dtype).max
    assert nbytes(weight)["order"] == entries * dtype.itemsize


def test_a_segment_needs_a_zero_point_or_an_offset_and_not_both() -> None:
    codes, scale = torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.float16)
    with pytest.raises(AssertionError):
        pack_segment(codes, scale, bits=2, group_size=4)
    with pytest.raises(AssertionError):
        pack_segment(codes, scale, bits=2, group_size=4, zero=1, offset=scale)
    with pytest.raises(AssertionError):
        pack_segment(codes, scale, bits=2, group_size=2, zero=1)

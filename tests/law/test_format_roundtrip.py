"""Law: storing a packed matrix and reading it back changes no weight, and the bytes are those that were counted."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import random_segment

from bitfloor.core.packed import PackedWeight, dequantize, nbytes
from bitfloor.core.spec import BITS
from bitfloor.formats.files import describe_tensor, read_artifact, write_artifact
from bitfloor.formats.layout import check_layout, tensor_names
from bitfloor.formats.native import decode, encode, layout, reject
from bitfloor.ops.reference import row_panel, take_rows


@st.composite
def packed_weights(draw: st.DrawFn) -> PackedWeight:
    """Any matrix the format can hold: widths, ragged groups and edges, segments, zeros, offsets, orders."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    segments = []
    start = 0
    for _ in range(draw(st.integers(1, 3))):
        columns, bits = draw(st.integers(1, 70)), draw(st.sampled_from(BITS))
        zero = draw(st.sampled_from(["packed", "offset", 0, 2 ** (bits - 1)]))
        segment = random_segment(
            generator,
            rows,
            columns,
            bits,
            start=start,
            group_size=draw(st.integers(1, columns + 3)),
            zero=zero,
            channel_scale=draw(st.booleans()),
            dtype=dtype,
        )
        segments.append(segment)
        start = segment.stop
    order, unit, inputs = None, 1, start
    kind = draw(st.sampled_from(["natural", "channels", "groups"]))
    if kind == "channels":  # may leave channels out and repeat others
        inputs = draw(st.integers(1, 400))
        order = torch.randint(0, inputs, (start,), generator=generator)
    elif kind == "groups":  # a permutation of groups, the short one anywhere
        unit = draw(st.integers(1, 16))
        order = torch.randperm(-(-start // unit), generator=generator)
    sort = draw(st.booleans())
    channels = torch.randperm(inputs, generator=generator) if sort else None
    return PackedWeight((rows, inputs), tuple(segments), order, unit, draw(st.sampled_from([0, 4, 32])), channels)


@settings(max_examples=150, deadline=None)
@given(packed_weights())
def test_encode_then_decode_is_the_identity_on_weights_and_bytes(weight: PackedWeight) -> None:
    assert reject(weight) is None
    described = check_layout(layout(weight), "layout")
    tensors = encode("m", weight)
    again = decode("m", described, tensors.__getitem__)
    assert torch.equal(dequantize(again), dequantize(weight))
    assert sum(nbytes(weight).values()) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert {(name, *describe_tensor(t)) for name, t in tensors.items()} == set(tensor_names("m", described))
    repeated = encode("m", again)
    assert all(torch.equal(repeated[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=25, deadline=None)
@given(packed_weights())
def test_a_file_gives_back_the_same_weights(weight: PackedWeight) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_artifact(path, encode("m", weight), {"note": "x"})
        tensors, metadata = read_artifact(path)
    assert metadata == {"note": "x"}
    assert torch.equal(dequantize(decode("m", layout(weight), tensors.__getitem__)), dequantize(weight))


@settings(max_examples=60, deadline=None)
@given(packed_weights(), st.data())
def test_rows_can_be_taken_without_unpacking_the_others(weight: PackedWeight, data: st.DataObject) -> None:
    dense = dequantize(weight)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, weight.shape[0] - 1), min_size=1, max_size=20)))
    # What is stored is equal bit for bit; a rotation's sums may differ in the last bits with the number of rows.
    slack = 1e-6 * float(dense.abs().max()) if weight.rotation else 0.0
    torch.testing.assert_close(dequantize(take_rows(weight, rows)), dense[rows], rtol=0, atol=slack)
    start = 16 * data.draw(st.integers(0, (weight.shape[0] - 1) // 16))
    stop = data.draw(st.integers(start + 1, weight.shape[0]))
    torch.testing.assert_close(dequantize(row_panel(weight, start, stop)), dense[start:stop], rtol=0, atol=slack)

"""The native codec: shared orders, types, and what it refuses to store. The round trip itself is a law test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packing import random_segment

from bitfloor.core.errors import BitfloorError
from bitfloor.core.packed import PackedWeight, dequantize, nbytes
from bitfloor.formats import native
from bitfloor.formats.base import Codec


def _weight() -> PackedWeight:
    generator = torch.Generator().manual_seed(1)
    first = random_segment(generator, 20, 40, 4)
    second = random_segment(generator, 20, 30, 1, start=40, zero="offset", channel_scale=True)
    return PackedWeight((20, 300), (first, second), torch.randperm(300, generator=generator)[:70])


def test_the_module_is_a_codec() -> None:
    codec: Codec = native
    assert codec.reject(_weight()) is None


def test_an_order_is_stored_once_and_in_the_smallest_type() -> None:
    weight = _weight()
    own, shared = native.encode("q", weight), native.encode("k", weight, order_of="q")
    assert own["q.order"].dtype == torch.uint16 and "k.order" not in shared
    again = native.decode("k", native.layout(weight), {**own, **shared}.__getitem__, order_of="q")
    assert torch.equal(dequantize(again), dequantize(weight))
    saved = sum(t.nbytes for t in own.values()) - sum(t.nbytes for t in shared.values())
    assert saved == nbytes(weight)["order"] == 140


def test_what_cannot_be_stored_is_named() -> None:
    weight = _weight()
    first, second = weight.segments
    cases = {
        "mixes scale types": (replace(first, scale=first.scale.bfloat16()), second),
        "torch.float32": (replace(first, scale=first.scale.float()), second),
        "begins at column 41": (first, replace(second, start=41)),
        "not both": (replace(first, zero=None), second),
        "too large for 4 bits": (replace(first, zero=first.zero + 16), second),
        "no segments": (),
    }
    for message, segments in cases.items():
        with pytest.raises(BitfloorError, match=message):
            native.encode("m", replace(weight, segments=segments))
    with pytest.raises(BitfloorError, match="m cannot be stored.*70 of 300 columns"):
        native.encode("m", replace(weight, order=None))
    with pytest.raises(BitfloorError, match="entry 300 of 300"):
        native.encode("m", replace(weight, order=torch.full((70,), 300)))

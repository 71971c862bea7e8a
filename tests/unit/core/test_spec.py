"""Specs refuse what cannot be stored, in words."""

from __future__ import annotations

from typing import Any

import pytest

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.spec import BITS, MatrixRef, QuantSpec


@pytest.mark.parametrize("bits", BITS)
def test_every_width_is_accepted(bits: int) -> None:
    assert QuantSpec(bits, 64).bits == bits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 7}, "bits = 7"),
        ({"bits": 0}, "bits = 0"),
        ({"bits": 16}, "bits = 16"),
        ({"group_size": 0}, "group_size = 0"),
        ({"group_size": -2}, "group_size = -2"),
        ({"scale_dtype": "float32"}, "scale_dtype = 'float32'"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_value_and_a_way_out(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="use ") as caught:
        QuantSpec(**({"bits": 2, "group_size": 64} | change))
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(("group_size", "columns", "expected"), [(-1, 576, 576), (64, 576, 64), (128, 96, 96)])
def test_a_group_is_never_larger_than_the_row(group_size: int, columns: int, expected: int) -> None:
    assert QuantSpec(2, group_size).columns_per_group(columns) == expected


def test_specs_and_references_are_values() -> None:
    assert {QuantSpec(2, 64), QuantSpec(2, 64)} == {QuantSpec(2, 64)}
    ref = MatrixRef("a.b", "a.b.weight", (4, 8), 0, "linear")
    assert ref == MatrixRef("a.b", "a.b.weight", (4, 8), 0, "linear")
    assert ref.index is None
    assert not ref.transposed


def test_exit_codes_tell_wrong_input_from_a_failed_run() -> None:
    assert BitfloorError.exit_code == 1
    assert InputError.exit_code == 2
    assert issubclass(InputError, BitfloorError)

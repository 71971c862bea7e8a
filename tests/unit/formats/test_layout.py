"""The configuration block: what version 1 says, and that nothing it does not say is accepted."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

from bitfloor.core.errors import FormatWarning, InputError
from bitfloor.formats.layout import (
    announce_version,
    build_config,
    order_fault,
    order_type,
    parse_config,
    tensor_names,
)

SEGMENTS = [
    {"columns": 40, "bits": 4, "group_size": 16, "zero": "packed", "offset": False, "channel_scale": False},
    {"columns": 70, "bits": 1, "group_size": 70, "zero": None, "offset": True, "channel_scale": True},
    {"columns": 5, "bits": 3, "group_size": 16, "zero": 4, "offset": False, "channel_scale": False},
]
LAYOUT = {
    "shape": [33, 115],
    "kind": "linear",
    "transposed": False,
    "scale_dtype": "bfloat16",
    "segments": SEGMENTS,
    "order": {"unit": 1, "count": 115},
}
PLAIN = {**LAYOUT, "shape": [33, 40], "segments": SEGMENTS[:1], "order": None}


def test_tensors_follow_from_the_layout() -> None:
    assert tensor_names("m", LAYOUT) == [
        ("m.codes", "U8", (3, 2 * 256 + 3 * 64 + 1 * 192)),
        ("m.scale", "BF16", (3, 3 + 1 + 1, 16)),
        ("m.zero", "U8", (3, 3 * 2 * 4)),
        ("m.offset", "BF16", (3, 1, 16)),
        ("m.channel_scale", "BF16", (70,)),
        ("m.order", "U8", (115,)),
    ]
    assert [name for name, _, _ in tensor_names("m", PLAIN)] == ["m.codes", "m.scale", "m.zero"]
    assert "m.order" not in [name for name, _, _ in tensor_names("m", LAYOUT, with_order=False)]


@pytest.mark.parametrize(
    ("inputs", "unit", "expected"), [(256, 1, "U8"), (257, 1, "U16"), (65537, 1, "U32"), (4096, 64, "U8")]
)
def test_orders_use_the_smallest_type(inputs: int, unit: int, expected: str) -> None:
    assert order_type({"shape": [1, inputs], "order": {"unit": unit, "count": 1}}) == expected


def _content() -> dict[str, Any]:
    config = build_config(
        {"a": LAYOUT, "b": LAYOUT, "c": PLAIN},
        orders={"b": "a"},
        tied={"lm_head.weight": "wte.weight"},
        kept=["norm.weight", "wte.weight"],
        recipe={"name": "rtn", "sha256": "0" * 64},
    )
    return copy.deepcopy(config.to_dict())


def test_equal_layouts_are_stored_once_and_a_round_trip_changes_nothing() -> None:
    content = _content()
    assert len(content["layouts"]) == 2 and content["matrices"] == {"a": 0, "b": 0, "c": 1}
    config = parse_config(content)
    assert config.to_dict() == content
    assert len(config.tensors_of("a")) == 6 and len(config.tensors_of("b")) == 5


def test_a_rotation_is_written_only_where_there_is_one() -> None:
    content = build_config({"a": {**PLAIN, "rotation": 8}, "b": PLAIN}).to_dict()
    assert ["rotation" in layout for layout in content["layouts"]] == [True, False]
    assert parse_config(content).to_dict() == content


def _set(content: dict[str, Any], path: str, value: Any) -> None:
    target: Any = content
    *steps, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for step in steps:
        target = target[step]
    target[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(("format_version", bad, "format_version .* reads versions 0 to 1") for bad in (2, None, True, 1.0, "1", -1)),
        ("quant_method", "gptq", "not a bitfloor checkpoint"),
        ("rotations", [], "unknown key 'rotations'.*newer bitfloor"),
        ("layouts/0/mirror", 4, "layout 0 has the unknown key 'mirror'"),
        *(("layouts/0/rotation", bad, "rotation = ") for bad in (0, 1, 3, True, 2048, "64", None)),
        ("layouts/0/segments/1/codebook", 1, "segment 1 has the unknown key 'codebook'"),
        ("layouts/0/segments/1/bits", 7, "bits = 7"),
        ("layouts/0/segments/1/bits", True, "bits = True"),
        ("layouts/0/segments/1/group_size", 0, "group_size = 0"),
        ("layouts/0/segments/1/columns", 71, "order ="),
        ("layouts/1/segments/0/columns", 39, "39 columns of 40"),
        ("layouts/0/segments/0/zero", None, "together with offset False"),
        ("layouts/0/segments/0/zero", 1.5, "zero = 1.5"),
        ("layouts/0/segments/0/offset", 1, "offset = 1"),
        ("layouts/0/segments", [], "segments = "),
        ("layouts/0/shape", [0, 4], "shape = "),
        ("layouts/0/kind", "conv2d", "kind = 'conv2d'"),
        ("layouts/0/transposed", 0, "transposed = 0"),
        ("layouts/0/scale_dtype", "float32", "scale_dtype = 'float32'"),
        ("layouts/0/scale_dtype", {}, "scale_dtype = {}"),
        ("layouts/0", 3, "not a table"),
        ("matrices/a", 2, "layout = 2"),
        ("orders/b", "c", "orders has b = 'c'"),
        ("orders/c", "a", "orders has c = 'a'"),
        ("orders/a", "b", "orders has"),
        ("orders/b", ["a"], "orders has"),
        *((key, 3, f"{key} = 3") for key in ("layouts", "matrices", "orders", "tied", "kept", "recipe")),
        ("kept", ["norm.weight", "norm.weight", "wte.weight"], "norm.weight, twice"),
        ("kept", ["a.codes", "wte.weight"], "a.codes, twice"),
        ("kept", [1], "kept = "),
        ("tied/x.weight", "nothing.weight", "tied has x.weight = 'nothing.weight'"),
        ("tied/a.weight", "wte.weight", "tied has a.weight"),
        ("tied/norm.weight", "wte.weight", "tied has norm.weight"),
        ("tied/x.weight", ["wte.weight"], "tied has x.weight"),
        ("matrices/a", True, "layout = True"),
        ("layouts/0/segments/0/bits", 4.0, "bits = 4.0"),
        ("layouts/0/segments/2/zero", 8193, "zero = 8193"),
        ("layouts/0/segments/0/group_size", (1 << 30) + 1, "group_size = "),
        ("layouts/0/shape", [(1 << 30) + 1, 115], "shape = "),
        ("layouts/0/transposed", True, "transposed = True"),
        ("layouts/0/kind", "conv1d", "transposed = False"),
    ],
)
def test_what_version_1_does_not_say_is_refused(path: str, value: Any, message: str) -> None:
    content = _content()
    _set(content, path, value)
    with pytest.raises(InputError, match=message):
        parse_config(content)


@pytest.mark.parametrize(
    "other",
    [{**LAYOUT, "order": {"unit": 1, "count": 116}}, {**LAYOUT, "shape": [33, 116]}, PLAIN],
    ids=["count", "columns", "none"],
)
def test_an_order_is_shared_only_by_what_has_one_like_it(other: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="orders has b = 'a'"):
        parse_config(build_config({"a": LAYOUT, "b": other}, orders={"b": "a"}).to_dict())
    parse_config(build_config({"a": LAYOUT, "b": {**LAYOUT, "shape": [70, 115]}}, orders={"b": "a"}).to_dict())


def test_a_missing_key_is_named() -> None:
    content = _content()
    del content["layouts"][0]["order"]
    with pytest.raises(InputError, match="lacks the key 'order'"):
        parse_config(content)


def test_version_0_is_read_as_version_1_and_said_once() -> None:
    content = {**_content(), "format_version": 0}
    config = parse_config(content)
    assert config.version == 0 and config.to_dict() == _content()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        announce_version(config)
        announce_version(config)
        announce_version(parse_config(_content()))
    assert [warning.category for warning in caught] == [FormatWarning]


def test_no_version_may_have_unknown_keys() -> None:
    with pytest.raises(InputError, match="unknown key 'later'"):
        parse_config({**_content(), "format_version": 0, "later": 1})
    content = _content()
    content["recipe"]["anything"] = {"else": [1]}  # but here
    assert parse_config(content).recipe["anything"] == {"else": [1]}


@pytest.mark.parametrize(
    ("unit", "order", "fault"),
    [
        (1, list(range(115)), None),
        (1, [*range(114), 3], None),  # one twice, one never
        (1, [*range(114), 115], "names entry 115 of 115"),
        (1, list(range(114)), "names 114 channels for 115 stored columns"),
        (10, [11, *range(11)], None),  # the cut unit in front
        (10, [10, *range(11)], "names 120 channels"),
        (10, [11, 11, *range(10)], "names 110 channels"),
    ],
)
def test_an_order_names_as_many_channels_as_columns_are_stored(unit: int, order: list[int], fault: str | None) -> None:
    found = order_fault({**LAYOUT, "order": {"unit": unit, "count": len(order)}}, order)
    assert found == fault or (fault is not None and found is not None and found.startswith(fault))

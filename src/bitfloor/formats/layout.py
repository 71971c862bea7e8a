"""The description of a native checkpoint: layouts of matrices, the tensors they imply, the configuration block.

Plain data and arithmetic, no torch: ``bitfloor inspect`` and the loaders check a checkpoint with this before a single
tensor is read. ``docs/format.md`` is the specification; unknown keys are refused, because a reader that ignores what it
does not understand returns wrong weights. Version 0 is read too, by :func:`from_version_0`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitfloor.core.errors import FormatWarning, InputError
from bitfloor.core.spec import is_rotation

QUANT_METHOD = "bitfloor"
FORMAT_VERSION = 1
KINDS = ("linear", "conv1d", "expert", "embedding", "head")
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
SCALE_TYPES = {"float16": "F16", "bfloat16": "BF16"}
PARTS = ("codes", "scale", "zero", "offset", "channel_scale", "order", "channels")
LAYOUT_KEYS = {"shape", "kind", "transposed", "scale_dtype", "segments", "order"}
PACKED, CENTRE = "packed", "centre"  # zero-points: one a group, or (2^b - 1) / 2
SEGMENT_KEYS = {"columns", "bits", "group_size", "zero", "offset", "channel_scale"}
OPTIONAL_KEYS = {"rotation", "channels"}  # absent for none
CONFIG_KEYS = {"quant_method", "format_version", "layouts", "matrices", "orders", "tied", "kept", "recipe"}
MOST = 1 << 30  # rows, columns, columns of a group, entries of an order: no size that follows overflows 64 bits
MOST_SEGMENTS = 1 << 16
LARGEST_ZERO = 1 << 13  # of a constant zero-point: its product with a scale (11 bits) is then exact in float32

Layout = dict[str, Any]


def groups(segment: Mapping[str, Any]) -> int:
    """Number of groups of a segment; the last one may be short."""
    return -(-int(segment["columns"]) // int(segment["group_size"]))


def code_bytes(segment: Mapping[str, Any]) -> int:
    """Bytes of one row block (16 rows) of a segment's codes: ``64 * bits`` for every 32 columns."""
    return -(-int(segment["columns"]) // 32) * 64 * int(segment["bits"])


def order_type(layout: Layout) -> str:
    """Smallest unsigned type for the entries of an order."""
    return index_type(-(-layout["shape"][1] // layout["order"]["unit"]))


def index_type(entries: int) -> str:
    """Smallest unsigned type that tells so many entries apart."""
    return "U8" if entries <= 1 << 8 else "U16" if entries <= 1 << 16 else "U32"


def order_fault(layout: Layout, order: Sequence[int]) -> str | None:
    """Why the entries of a stored order cannot be the order of a layout; a clause, or None if they can."""
    inputs, unit = layout["shape"][1], layout["order"]["unit"]
    entries = -(-inputs // unit)
    if order and max(order) >= entries:
        return f"names entry {max(order)} of {entries}"
    cut = entries * unit - inputs  # channels that the last entry lacks
    found = unit * len(order) - cut * sum(entry == entries - 1 for entry in order)
    stored = sum(segment["columns"] for segment in layout["segments"])
    return None if found == stored else f"names {found} channels for {stored} stored columns"


def part_shapes(layout: Layout, *, with_order: bool = True) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The stored parts of a matrix: part name to ``(safetensors type, shape)``, in the order of ``PARTS``.

    Args:
        layout: a layout that passed :func:`check_layout`.
        with_order: False where another matrix of the same input stores the order.
    """
    blocks = -(-layout["shape"][0] // 16)
    segments = layout["segments"]
    scale_type = SCALE_TYPES[layout["scale_dtype"]]
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "codes": ("U8", (blocks, sum(code_bytes(s) for s in segments))),
        "scale": (scale_type, (blocks, sum(groups(s) for s in segments), 16)),
    }
    if packed := [s for s in segments if s["zero"] == PACKED]:
        parts["zero"] = ("U8", (blocks, sum(2 * s["bits"] * groups(s) for s in packed)))
    if shifted := [s for s in segments if s["offset"]]:
        parts["offset"] = (scale_type, (blocks, sum(groups(s) for s in shifted), 16))
    if scaled := [s for s in segments if s["channel_scale"]]:
        parts["channel_scale"] = (scale_type, (sum(s["columns"] for s in scaled),))
    if layout["order"] is not None and with_order:
        parts["order"] = (order_type(layout), (layout["order"]["count"],))
    if layout.get("channels"):
        parts["channels"] = (index_type(layout["shape"][1]), (layout["shape"][1],))
    return parts


def tensor_names(name: str, layout: Layout, *, with_order: bool = True) -> list[tuple[str, str, tuple[int, ...]]]:
    """``(tensor name, safetensors type, shape)`` of everything stored for the matrix ``name``."""
    return [(f"{name}.{part}", *spec) for part, spec in part_shapes(layout, with_order=with_order).items()]


def check_layout(layout: Any, where: str) -> Layout:
    """Return ``layout`` if every reader of this version understands it completely.

    Args:
        layout: one entry of ``layouts``.
        where: how to name it in the message.

    Raises:
        InputError: a key is missing or unknown, or a value is out of range.
    """
    _check_keys(layout, LAYOUT_KEYS, where, OPTIONAL_KEYS)
    rows_columns, segments, order = layout["shape"], layout["segments"], layout["order"]
    if not (_is_list(rows_columns) and len(rows_columns) == 2 and all(_is_count(n) for n in rows_columns)):
        raise _bad(where, "shape", rows_columns)
    if layout["kind"] not in KINDS:
        raise _bad(where, "kind", layout["kind"])
    transposed = layout["transposed"]
    fits = {"expert": (True, False), "conv1d": (True,)}.get(layout["kind"], (False,))
    if not isinstance(transposed, bool) or transposed not in fits:
        raise _bad(where, "transposed", transposed)
    if not isinstance(layout["scale_dtype"], str) or layout["scale_dtype"] not in SCALE_TYPES:
        raise _bad(where, "scale_dtype", layout["scale_dtype"])
    rotation = layout.get("rotation", 2)
    if isinstance(rotation, bool) or not isinstance(rotation, int) or not rotation or not is_rotation(rotation):
        raise _bad(where, "rotation", rotation)
    if layout.get("channels", True) is not True:
        raise _bad(where, "channels", layout["channels"])
    if not (_is_list(segments) and 0 < len(segments) <= MOST_SEGMENTS):
        raise _bad(where, "segments", f"{len(segments)} of them" if segments and _is_list(segments) else segments)
    for index, segment in enumerate(segments):
        _check_segment(segment, f"{where}, segment {index}")
    stored = sum(segment["columns"] for segment in segments)
    if stored > MOST:
        raise _bad(where, "segments", f"{stored} columns")
    if order is None:
        if stored != rows_columns[1]:
            raise _bad(where, "segments", f"{stored} columns of {rows_columns[1]} without an order")
        return dict(layout)
    _check_keys(order, {"unit", "count"}, f"{where}, order")
    unit, count = order["unit"], order["count"]
    # The last unit may be cut at the matrix edge, once or several times if it repeats; the rest is full.
    if not (_is_count(unit) and _is_count(count) and stored <= unit * count):
        raise _bad(where, "order", order)
    return dict(layout)


def _check_segment(segment: Any, where: str) -> None:
    _check_keys(segment, SEGMENT_KEYS, where)
    if not _is_count(segment["columns"]):
        raise _bad(where, "columns", segment["columns"])
    if segment["bits"] not in WIDTHS or not _is_count(segment["bits"]):
        raise _bad(where, "bits", segment["bits"])
    if not _is_count(segment["group_size"]):
        raise _bad(where, "group_size", segment["group_size"])
    for key in ("offset", "channel_scale"):
        if not isinstance(segment[key], bool):
            raise _bad(where, key, segment[key])
    zero = segment["zero"]
    constant = isinstance(zero, int) and not isinstance(zero, bool) and abs(zero) <= LARGEST_ZERO
    if not (zero is None or zero in (PACKED, CENTRE) or constant):
        raise _bad(where, "zero", zero)
    if (zero is None) != segment["offset"]:
        raise _bad(where, "zero", f"{zero} together with offset {segment['offset']}")


def _check_keys(value: Any, expected: set[str], where: str, optional: Iterable[str] = ()) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"the {QUANT_METHOD} configuration is damaged: {where} is {value!r}, not a table.")
    if unknown := sorted(set(value) - expected - set(optional)):
        raise InputError(
            f"{where} has the unknown key {unknown[0]!r}; this checkpoint needs a newer bitfloor, install that one."
        )
    if missing := sorted(expected - set(value)):
        raise InputError(f"{where} lacks the key {missing[0]!r}; the checkpoint is damaged, copy it again.")


def _bad(where: str, key: str, value: Any) -> InputError:
    return InputError(f"{where} has {key} = {value!r}, which this version of bitfloor cannot read; copy it again.")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


@dataclass(frozen=True)
class NativeConfig:
    """The ``quantization_config`` of a native checkpoint.

    Args:
        layouts: distinct layouts.
        matrices: matrix name to index into ``layouts``.
        orders: matrix name to the name of the matrix that stores its order (input groups store it once).
        tied: parameter name to the name of the parameter it shares, as in ``{"lm_head.weight": "wte.weight"}``.
        kept: names of the tensors stored as they were.
        recipe: ``{"name", "sha256"}`` of what was done, or anything else, or empty: readers ignore it.
        version: the format version that it was read from. What is written is always ``FORMAT_VERSION``.
    """

    layouts: tuple[Layout, ...]
    matrices: dict[str, int]
    orders: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def layout_of(self, name: str) -> Layout:
        """The layout of a matrix."""
        return self.layouts[self.matrices[name]]

    def tensors_of(self, name: str) -> list[tuple[str, str, tuple[int, ...]]]:
        """``(tensor name, safetensors type, shape)`` of what is stored under a matrix's own name."""
        return tensor_names(name, self.layout_of(name), with_order=name not in self.orders)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, the way ``config.json`` holds it."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "layouts": [dict(layout) for layout in self.layouts],
            "matrices": dict(self.matrices),
            "orders": dict(self.orders),
            "tied": dict(self.tied),
            "kept": list(self.kept),
            "recipe": dict(self.recipe),
        }


def build_config(
    layouts: Mapping[str, Layout],
    *,
    orders: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    kept: Iterable[str] = (),
    recipe: Mapping[str, Any] | None = None,
) -> NativeConfig:
    """Collect the layouts of all matrices, equal ones once, in the order of their first use.

    Args:
        layouts: matrix name to layout.
        orders: see :class:`NativeConfig`, like the rest.
    """
    distinct: list[Layout] = []
    positions: dict[str, int] = {}
    matrices: dict[str, int] = {}
    for name, layout in layouts.items():
        key = repr(sorted(layout.items()))
        if key not in positions:
            positions[key] = len(distinct)
            distinct.append(layout)
        matrices[name] = positions[key]
    return NativeConfig(
        tuple(distinct), matrices, dict(orders or {}), dict(tied or {}), tuple(kept), dict(recipe or {})
    )


def parse_config(content: Any) -> NativeConfig:
    """Check a ``quantization_config`` block completely.

    Raises:
        InputError: another method or version, an unknown key, or values out of range.
    """
    where = "quantization_config"
    if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
        raise InputError("this is not a bitfloor checkpoint: config.json has no quantization_config of bitfloor's.")
    version = content.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= FORMAT_VERSION:
        raise InputError(
            f"the checkpoint has format_version {version!r} and this bitfloor reads versions 0 to {FORMAT_VERSION}; "
            "install a newer bitfloor, or quantize the model again."
        )
    if version == 0:
        content = from_version_0(content)
    _check_keys(content, CONFIG_KEYS, where)
    if not _is_list(content["layouts"]):
        raise _bad(where, "layouts", content["layouts"])
    layouts = tuple(check_layout(layout, f"{where}, layout {i}") for i, layout in enumerate(content["layouts"]))
    matrices, orders, tied = (_table(content, key) for key in ("matrices", "orders", "tied"))
    for name, index in matrices.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(layouts):
            raise _bad(f"{where}, matrix {name!r}", "layout", index)
    for name, other in orders.items():
        known = name in matrices and isinstance(other, str) and other in matrices and other not in orders
        own, its = (layouts[matrices[n]] if known else {} for n in (name, other))
        if not known or own["order"] is None or (own["order"], own["shape"][1]) != (its["order"], its["shape"][1]):
            raise _bad(f"{where}, orders", name, other)
    kept = content["kept"]
    if not _is_list(kept) or not all(isinstance(name, str) for name in kept):
        raise _bad(where, "kept", kept)
    config = NativeConfig(layouts, matrices, orders, tied, tuple(kept), _table(content, "recipe"), version)
    _check_names(config)
    return config


def from_version_0(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of version 0 as one of version 1: the number alone differs.

    Every value that a writer of version 0 wrote is allowed in version 1 and means the same. Values that no writer wrote
    and that version 1 excludes are refused by the checks that follow.
    """
    return {**content, "format_version": 1}


def announce_version(config: NativeConfig) -> None:
    """Say, once in a process, that a checkpoint is of an older version."""
    if config.version != FORMAT_VERSION:
        warnings.warn(
            f"the checkpoint is of format version {config.version} and is read as version {FORMAT_VERSION}; "
            "`bitfloor migrate` writes it anew, with checksums.",
            FormatWarning,
            stacklevel=1,  # one place, whoever asks: said once
        )


def _table(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(content[key], Mapping):
        raise _bad("quantization_config", key, content[key])
    return dict(content[key])


def _check_names(config: NativeConfig) -> None:
    """Every stored name once; a tied parameter is stored under the other's name, and that one is stored."""
    stored = [name for matrix in config.matrices for name, _, _ in config.tensors_of(matrix)]
    counts = Counter([*stored, *config.kept])
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise _bad("quantization_config", "the tensor", f"{twice[0]}, twice")
    parameters = {f"{matrix}.weight" for matrix in config.matrices}
    kept = set(config.kept)
    for target, source in config.tied.items():
        there = isinstance(source, str) and (source in kept or source in parameters)
        if not there or target in kept or target in parameters:
            raise _bad("quantization_config, tied", target, source)

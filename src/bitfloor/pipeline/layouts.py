"""What a matrix will look like in the file, from its storage alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from bitfloor.core.headers import byte_count
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.formats.layout import CENTRE, PACKED, Layout, tensor_names

Tiers = Callable[[int], list[tuple[int, int]]]


def spec_layout(ref: MatrixRef, spec: QuantSpec, tiers: Tiers | None = None) -> Layout:
    """The layout a matrix will have: a segment for each width, narrow ones first, as it is packed.

    Args:
        ref: the matrix.
        spec: its storage.
        tiers: of a method that stores whole channels at widths of its own; None for any other.
    """
    if tiers is not None and ref.block >= 0:
        return _tier_layout(ref, spec, tiers)
    rows, columns = ref.shape
    size = spec.columns_per_group(columns)
    widths = spec.group_widths(columns)
    order = sorted(range(len(widths)), key=widths.__getitem__)
    segments = []
    for bits in sorted(set(widths)):
        taken = [min(size, columns - k * size) for k in order if widths[k] == bits]
        offset = bits == 1 and not spec.centred
        constant: str | int = CENTRE if bits <= spec.centred else 1 << (bits - 1) if spec.symmetric else PACKED
        segments.append(
            {
                "columns": sum(taken),
                "bits": bits,
                "group_size": size,
                "zero": None if offset else constant,
                "offset": offset,
                "channel_scale": False,
            }
        )
    natural = order == list(range(len(order)))
    layout: Layout = {
        "shape": [rows, columns],
        "kind": ref.kind,
        "transposed": ref.transposed,
        "scale_dtype": spec.scale_dtype,
        "segments": segments,
        "order": None if natural else {"unit": size, "count": len(order)},
    }
    if spec.rotation:
        layout["rotation"] = spec.rotation
    if spec.channels:
        layout["channels"] = True
    return layout


def _tier_layout(ref: MatrixRef, spec: QuantSpec, tiers: Tiers) -> Layout:
    """Segments of whole channels; those of one bit have offsets and a scale for each channel. Two have an order."""
    rows, columns = ref.shape
    parts = tiers(columns)
    segments = [
        {
            "columns": own,
            "bits": bits,
            "group_size": own,
            "zero": None if bits == 1 else "packed",
            "offset": bits == 1,
            "channel_scale": bits == 1,
        }
        for own, bits in parts
    ]
    return {
        "shape": [rows, columns],
        "kind": ref.kind,
        "transposed": ref.transposed,
        "scale_dtype": spec.scale_dtype,
        "segments": segments,
        "order": {"unit": 1, "count": columns} if len(parts) > 1 else None,
    }


def input_twins(refs: Iterable[MatrixRef], wanted: Collection[str]) -> dict[str, str]:
    """Which matrices of a block read the tensor that another one reads, as far as names and shapes tell.

    Matrices of one module with equally many input channels read one tensor: query, key and value; gate and up. Where
    all of a module have equally many, the last one reads what the others made: an output projection of attention.

    Args:
        refs: all matrices of the block, in module order.
        wanted: those to speak of.

    Returns:
        name to the first wanted matrix that reads the same, for those that are not the first.
    """
    modules: dict[str, list[MatrixRef]] = {}
    for ref in refs:
        modules.setdefault(ref.name.rpartition(".")[0], []).append(ref)
    twins = {}
    for members in modules.values():
        alike = members[:-1] if len({ref.shape[1] for ref in members}) == 1 else members
        first: dict[int, str] = {}
        for ref in (ref for ref in alike if ref.name in wanted):
            if first.setdefault(ref.shape[1], ref.name) != ref.name:
                twins[ref.name] = first[ref.shape[1]]
    return twins


def stored_size(ref: MatrixRef, spec: QuantSpec) -> int:
    """Bytes a matrix will take, side values, padding and order included."""
    layout = spec_layout(ref, spec)
    return sum(byte_count(dtype, shape) for _, dtype, shape in tensor_names(ref.name, layout))

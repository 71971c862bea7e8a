"""What a matrix will look like in the file, from its storage alone."""

from __future__ import annotations

from bitfloor.core.headers import byte_count
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.formats.layout import Layout, tensor_names


def spec_layout(ref: MatrixRef, spec: QuantSpec) -> Layout:
    """The layout a matrix will have: a segment for each width, narrow ones first, as it is packed."""
    rows, columns = ref.shape
    size = spec.columns_per_group(columns)
    widths = spec.group_widths(columns)
    order = sorted(range(len(widths)), key=widths.__getitem__)
    segments = []
    for bits in sorted(set(widths)):
        taken = [min(size, columns - k * size) for k in order if widths[k] == bits]
        offset = bits == 1
        segments.append(
            {
                "columns": sum(taken),
                "bits": bits,
                "group_size": size,
                "zero": None if offset else (1 << (bits - 1) if spec.symmetric else "packed"),
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


def stored_size(ref: MatrixRef, spec: QuantSpec) -> int:
    """Bytes a matrix will take, side values, padding and order included."""
    layout = spec_layout(ref, spec)
    return sum(byte_count(dtype, shape) for _, dtype, shape in tensor_names(ref.name, layout))

"""Counting bytes: what a plan promises and a report states, by one rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from bitfloor.core.headers import byte_count
from bitfloor.formats.layout import tensor_names
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.job import Assignment


def parameter_sizes(source: SourceModel) -> dict[str, tuple[int, int]]:
    """``(elements, bytes as stored in the source)`` of every parameter and persistent buffer of the model."""
    width = {target: info.dtype.itemsize for info in source.tensors.values() for target in info.targets}
    return {
        name: (tensor.numel(), tensor.numel() * width[name])
        for name, tensor in source.skeleton.state_dict().items()
        if name in width
    }


def stored_bytes(layouts: Mapping[str, Mapping[str, Any]], orders: Iterable[str] = ()) -> dict[str, int]:
    """Bytes of every matrix by name, from its layout.

    Args:
        layouts: by name.
        orders: matrices whose order another one stores.
    """
    shared = set(orders)
    return {
        name: sum(
            byte_count(dtype, shape)
            for _, dtype, shape in tensor_names(name, dict(layout), with_order=name not in shared)
        )
        for name, layout in layouts.items()
    }


def matrix_bytes(source: SourceModel, assignment: Assignment, stored: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every matrix: ``stored`` for the quantized ones, the source's for those that are kept."""
    held = parameter_sizes(source)
    experts = Counter(ref.param for ref in assignment.refs.values())
    kept = {name: assignment.refs[name].param for name in assignment.kept}
    return {**stored, **{name: held[param][1] // experts[param] for name, param in kept.items()}}


def size_summary(
    source: SourceModel, assignment: Assignment, stored: Mapping[str, int], promised: int | None = None
) -> dict[str, Any]:
    """Bits and bytes of the whole model, measured or predicted.

    Args:
        source: the float model.
        assignment: what is quantized and what is kept.
        stored: bytes of every quantized matrix.
        promised: bytes that the quantized matrices of the blocks take in all at most, where that is all that is known.

    Returns:
        ``bits_per_linear_weight`` (all linears of the blocks, kept ones at their own width), ``bits_per_parameter``,
        ``bytes`` by kind, ``parameters``, and ``bytes_at_16_bits``, the size of the same model in half precision.
    """
    refs = assignment.refs
    held = parameter_sizes(source)
    sizes = matrix_bytes(source, assignment, stored)
    linears = [name for name in sizes if refs[name].block >= 0]
    ends = [name for name in sizes if refs[name].block < 0]
    weights = {name: refs[name].shape[0] * refs[name].shape[1] for name in sizes}
    other_bytes = sum(held[name][1] for name in source.map.kept)
    other_count = sum(held[name][0] for name in source.map.kept)
    linear_bytes, end_bytes = sum(sizes[n] for n in linears), sum(sizes[n] for n in ends)
    if promised is not None:
        linear_bytes += promised - sum(stored[n] for n in linears if n in stored)
    total = linear_bytes + end_bytes + other_bytes
    parameters = sum(weights.values()) + other_count
    linear_weights = sum(weights[n] for n in linears)
    return {
        "bits_per_linear_weight": 8 * linear_bytes / linear_weights if linear_weights else 0.0,
        "bits_per_parameter": 8 * total / parameters,
        "bytes": {"total": total, "linears": linear_bytes, "embeddings": end_bytes, "other": other_bytes},
        "parameters": parameters,
        "bytes_at_16_bits": 2 * parameters,
    }

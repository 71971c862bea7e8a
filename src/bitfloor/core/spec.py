"""How one matrix is to be quantized, and which matrix of a model is meant."""

from __future__ import annotations

from dataclasses import dataclass

from bitfloor.core.errors import InputError

BITS = (1, 2, 3, 4, 5, 6, 8)
LARGEST_ROTATION = 1024
SCALE_DTYPES = ("float16", "bfloat16")


ROTATIONS = f"0 (none) or a power of two from 2 to {LARGEST_ROTATION}"


def is_rotation(size: int) -> bool:
    """Whether ``size`` is the block size of a rotation, or 0 for none."""
    return size == 0 or (2 <= size <= LARGEST_ROTATION and size & (size - 1) == 0)


@dataclass(frozen=True)
class QuantSpec:
    """The storage of one matrix: width, grouping and grid kind.

    Args:
        bits: code width, one of 1, 2, 3, 4, 5, 6, 8.
        group_size: input channels that share one scale; -1 means the whole row. The last group may be short.
        symmetric: zero-point fixed at ``2 ** (bits - 1)`` (scales may then be negative); otherwise one zero-point per
            group, stored at ``bits`` bits. One-bit grids have no useful integer zero-point and always store a 16-bit
            offset instead.
        scale_dtype: ``"float16"`` or ``"bfloat16"``.
        rotation: input channels that a Hadamard matrix mixes before rounding, a power of two from 2 to 1024; 0 for
            none. See :mod:`bitfloor.core.rotation`.
        widths: code width of every group, in order of columns, where they differ; empty where ``bits`` is that of all.
        channels: order of the input channels that groups are cut from, before they are rotated, as bytes
            (:mod:`bitfloor.core.channels`); empty for natural order. See :mod:`bitfloor.core.basis`.
        centred: the widest groups whose levels lie in pairs around zero, zero itself being none of them; 0 for none.
            Their zero-point is ``(2 ** bits - 1) / 2`` and is not stored, nor is an offset.

    Raises:
        InputError: a value outside these ranges.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    scale_dtype: str = "float16"
    rotation: int = 0
    widths: tuple[int, ...] = ()
    channels: bytes = b""
    centred: int = 0

    def __post_init__(self) -> None:
        for bits in (self.bits, *self.widths):
            if bits not in BITS:
                known = ", ".join(map(str, BITS))
                raise InputError(f"bits = {bits} is not a width bitfloor stores; use one of {known}.")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(
                f"group_size = {self.group_size} is no number of columns; use a positive one, or -1 for whole rows."
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype = {self.scale_dtype!r} is unknown; use float16 or bfloat16.")
        if self.centred not in (0, *BITS):
            raise InputError(
                f"centred = {self.centred} is no width; use 0 (none) or one of {', '.join(map(str, BITS))}."
            )
        if self.centred and self.symmetric:
            raise InputError("a grid cannot be symmetric and centred; use one of them.")
        if not is_rotation(self.rotation):
            raise InputError(f"rotation = {self.rotation} is no block size; use {ROTATIONS}.")

    def columns_per_group(self, in_features: int) -> int:
        """Group size for a matrix with ``in_features`` columns: never larger than the row itself."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def group_widths(self, in_features: int) -> tuple[int, ...]:
        """Code width of every group of a matrix with ``in_features`` columns, in natural order.

        Raises:
            InputError: widths were given for another number of groups.
        """
        groups = -(-in_features // self.columns_per_group(in_features))
        if self.widths and len(self.widths) != groups:
            raise InputError(
                f"{len(self.widths)} widths are given for a matrix of {groups} groups ({in_features} columns in groups "
                f"of {self.columns_per_group(in_features)}); give one width a group."
            )
        return self.widths or (self.bits,) * groups


@dataclass(frozen=True)
class MatrixRef:
    """One quantizable matrix ``[O, I]`` of a model, by name.

    Args:
        name: public name, as in reports and files: ``"model.layers.0.mlp.experts.3.gate_up_proj"``.
        param: the parameter that holds it, from the model root: ``"model.layers.0.mlp.experts.gate_up_proj"``.
        shape: ``(O, I)``.
        block: index of the decoder block, -1 for the embedding and the head.
        kind: ``"linear"``, ``"conv1d"``, ``"expert"``, ``"embedding"`` or ``"head"``.
        index: the slice of a stacked three-dimensional parameter (``"expert"`` only).
        transposed: stored as ``[I, O]``.
    """

    name: str
    param: str
    shape: tuple[int, int]
    block: int
    kind: str
    index: int | None = None
    transposed: bool = False

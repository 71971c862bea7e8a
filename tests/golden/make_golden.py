"""Writes the golden checkpoint: an independent implementation of docs/format.md, by explicit loops.

It imports nothing of bitfloor, torch or safetensors and shares no table with them: it was written from the document, so
that a change of the layout in either place is noticed. Run ``python tests/golden/make_golden.py`` to write the files of
both versions again; a test compares them byte for byte with the committed ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
f32 = np.float32


class Numbers:
    """A small linear congruential generator: the same numbers on every machine and under every library version."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, limit: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % limit

    def half(self, scale_dtype: str) -> int:
        """The 16 bits of a value of magnitude 2^-10 to 2^3, either sign."""
        sign = self.below(2) << 15
        if scale_dtype == "float16":
            return sign | (5 + self.below(13)) << 10 | self.below(1 << 10)
        return sign | (117 + self.below(13)) << 7 | self.below(1 << 7)


def value_of(pattern: int, scale_dtype: str) -> np.float32:
    """A stored 16-bit pattern as float32."""
    if scale_dtype == "float16":
        return f32(np.array([pattern], dtype="<u2").view("<f2")[0])
    return f32(np.array([pattern << 16], dtype="<u4").view("<f4")[0])


def fragments(bits: int, quad: int) -> list[tuple[int, int, int, int]]:
    """Where the code of a quad lies in a tile: ``(line, bit in the byte, first code bit, number of code bits)``."""
    if bits in (1, 2, 4, 8):
        per_line = 8 // bits
        return [(quad // per_line, bits * (quad % per_line), 0, bits)]
    if bits == 3:
        if quad < 6:
            return [(quad // 2, 3 * (quad % 2), 0, 3)]
        return [(quad - 6, 6, 0, 2), (2, quad, 2, 1)]
    if bits == 5:
        if quad < 5:
            return [(quad, 0, 0, 5)]
        if quad == 5:
            return [(0, 5, 0, 3), (3, 5, 3, 2)]
        if quad == 6:
            return [(1, 5, 0, 3), (4, 6, 3, 2)]
        return [(2, 5, 0, 3), (3, 7, 4, 1), (4, 5, 3, 1)]
    if quad < 6:
        return [(quad, 0, 0, 6)]
    return [(3 * (quad - 6) + pair, 6, 2 * pair, 2) for pair in range(3)]


def tile_bytes(codes: list[list[int]], block: int, first_column: int, bits: int) -> bytearray:
    """One tile: 16 rows from ``16 * block``, 32 columns from ``first_column``; outside the matrix codes are zero."""
    tile = bytearray(64 * bits)
    for row in range(16):
        for column in range(32):
            r, c = 16 * block + row, first_column + column
            code = codes[r][c] if r < len(codes) and c < len(codes[0]) else 0
            for line, at, low, width in fragments(bits, column // 4):
                tile[64 * line + 4 * row + column % 4] |= (code >> low & (1 << width) - 1) << at
    return tile


def zero_bytes(zeros: list[list[int]], block: int, group: int, bits: int) -> bytearray:
    """The zero-points of 16 rows of one group, ``bits`` bits each, as one little-endian stream."""
    stream = bytearray(2 * bits)
    for row in range(16):
        value = zeros[16 * block + row][group] if 16 * block + row < len(zeros) else 0
        for bit in range(bits):
            position = row * bits + bit
            stream[position // 8] |= (value >> bit & 1) << position % 8
    return stream


def sixteen(values: list[list[int]], block: int, group: int) -> bytes:
    """The 16-bit values of 16 rows of one group, padding rows zero."""
    rows = range(16 * block, 16 * block + 16)
    return b"".join((values[r][group] if r < len(values) else 0).to_bytes(2, "little") for r in rows)


def make_matrix(
    numbers: Numbers, layout: dict[str, Any], stores_order: bool = True
) -> tuple[dict[str, bytes], np.ndarray]:
    """Random content for a layout: ``(part name to bytes, weights [O, I] float32)``."""
    rows, inputs = layout["shape"]
    blocks = (rows + 15) // 16
    dtype = layout["scale_dtype"]
    parts = {name: bytearray() for name in ("codes", "scale", "zero", "offset", "channel_scale", "order")}
    drawn = []
    stored = np.zeros((rows, sum(s["columns"] for s in layout["segments"])), dtype=f32)
    start = 0
    for segment in layout["segments"]:
        columns, bits, size = segment["columns"], segment["bits"], segment["group_size"]
        groups = (columns + size - 1) // size
        codes = [[numbers.below(1 << bits) for _ in range(columns)] for _ in range(rows)]
        scale = [[numbers.half(dtype) for _ in range(groups)] for _ in range(rows)]
        zeros = [[numbers.below(1 << bits) for _ in range(groups)] for _ in range(rows)]
        offset = [[numbers.half(dtype) for _ in range(groups)] for _ in range(rows)]
        channel = [numbers.half(dtype) for _ in range(columns)]
        for r in range(rows):
            for c in range(columns):
                k = c // size
                s = value_of(scale[r][k], dtype)
                if segment["offset"]:
                    shift = value_of(offset[r][k], dtype)
                else:
                    named = {"packed": zeros[r][k], "centre": (2**bits - 1) / 2}
                    shift = f32(-f32(named.get(segment["zero"], segment["zero"])) * s)
                weight = f32(f32(f32(codes[r][c]) * s) + shift)
                if segment["channel_scale"]:
                    weight = f32(weight * value_of(channel[c], dtype))
                stored[r, start + c] = weight
        if segment["channel_scale"]:
            parts["channel_scale"] += b"".join(v.to_bytes(2, "little") for v in channel)
        drawn.append((segment, codes, scale, zeros, offset, groups))
        start += columns
    for block in range(blocks):
        for segment, codes, scale, zeros, offset, groups in drawn:
            for first in range(0, segment["columns"], 32):
                parts["codes"] += tile_bytes(codes, block, first, segment["bits"])
            for k in range(groups):
                parts["scale"] += sixteen(scale, block, k)
                if segment["zero"] == "packed":
                    parts["zero"] += zero_bytes(zeros, block, k, segment["bits"])
                if segment["offset"]:
                    parts["offset"] += sixteen(offset, block, k)
    dense = stored
    if layout["order"] is not None:
        dense = np.zeros((rows, inputs), dtype=f32)
        unit, count = layout["order"]["unit"], layout["order"]["count"]
        entries = (inputs + unit - 1) // unit
        order = [(7 * p + 3) % entries for p in range(count)]
        width = 1 if entries <= 256 else 2
        if stores_order:
            parts["order"] += b"".join(v.to_bytes(width, "little") for v in order)
        channels = [v * unit + j for v in order for j in range(unit) if v * unit + j < inputs]
        for column, channel in enumerate(channels):
            for r in range(rows):
                dense[r, channel] = f32(dense[r, channel] + stored[r, column])
    if "rotation" in layout:
        dense = product(dense.astype(np.float64), rotation_matrix(inputs, layout["rotation"])).astype(f32)
    if layout.get("channels"):
        # Column j of what was rotated is input channel channels[j].
        natural = np.zeros_like(dense)
        channels = [(5 * j + 2) % inputs for j in range(inputs)]
        width = 1 if inputs <= 256 else 2
        parts["channels"] = bytearray(b"".join(v.to_bytes(width, "little") for v in channels))
        natural[:, channels] = dense
        dense = natural
    return {name: bytes(data) for name, data in parts.items() if data}, dense


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left @ right`` with sums rounded once: a library's own order of summing depends on the processor."""
    return np.array([[math.fsum(row * column) for column in right.T] for row in left])


def rotation_matrix(inputs: int, size: int) -> np.ndarray:
    """``R [I, I]``: entry ``(i, j)`` of a block of ``n`` is ``(-1)^(ones in the bits of i and j) / sqrt(n)``."""
    matrix = np.zeros((inputs, inputs))
    start, block = 0, size
    while start < inputs:
        while block > inputs - start:
            block //= 2
        for i in range(block):
            for j in range(block):
                matrix[start + i, start + j] = (-1.0) ** (i & j).bit_count() / block**0.5
        start += block
    return matrix


def segment(
    columns: int, bits: int, size: int, zero: str | int | None = "packed", channel: bool = False
) -> dict[str, Any]:
    """One entry of ``segments``; ``zero`` is ``"packed"``, ``"centre"``, a constant, or ``"offset"``."""
    offset = zero == "offset"
    return {
        "columns": columns,
        "bits": bits,
        "group_size": size,
        "zero": None if offset else zero,
        "offset": offset,
        "channel_scale": channel,
    }


def matrix(
    shape: tuple[int, int],
    segments: list[dict[str, Any]],
    scale_dtype: str = "float16",
    order: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One entry of ``layouts``; ``order`` is ``(unit, count)``."""
    return {
        "shape": list(shape),
        "kind": "linear",
        "transposed": False,
        "scale_dtype": scale_dtype,
        "segments": segments,
        "order": None if order is None else {"unit": order[0], "count": order[1]},
    }


MATRICES = {
    **{f"width_{b}": matrix((18, 37), [segment(37, b, 16)]) for b in (1, 2, 3, 4, 5, 6, 8)},
    "constant_zero": matrix((3, 40), [segment(40, 3, 32, 4)], "bfloat16"),
    "salient": matrix((17, 45), [segment(9, 4, 9), segment(36, 1, 36, "offset", True)], order=(1, 45)),
    "groups": matrix((5, 40), [segment(16, 3, 16), segment(16, 2, 16), segment(8, 1, 16, "offset")], order=(16, 3)),
    "planes": matrix((4, 300), [segment(20, 2, 8), segment(6, 5, 6, 0)], "bfloat16", order=(1, 26)),
    "rotated": {**matrix((6, 43), [segment(43, 3, 16)]), "rotation": 16},
    "sorted": {**matrix((6, 43), [segment(43, 3, 16)]), "channels": True},
    "sorted_rotated": {**matrix((3, 301), [segment(301, 2, 64)]), "rotation": 16, "channels": True},
    "centred": matrix((5, 41), [segment(16, 1, 16, "centre"), segment(25, 2, 8, "centre")], "bfloat16"),
    "centred_rotated": {**matrix((3, 40), [segment(24, 2, 8, "centre"), segment(16, 3, 8)]), "rotation": 8},
}


# What version 1 has beside them: every kind of matrix, an order that two share, a constant at the border.
MORE = {
    "embed": {**matrix((19, 40), [segment(40, 8, 32)], "bfloat16"), "kind": "embedding"},
    "head": {**matrix((19, 40), [segment(40, 6, 64)]), "kind": "head"},
    "conv": {**matrix((20, 33), [segment(33, 4, 8, -8192)]), "kind": "conv1d", "transposed": True},
    "experts.0.up": {**matrix((7, 35), [segment(35, 2, 16)]), "kind": "expert", "transposed": True},
    "experts.1.up": {**matrix((7, 35), [segment(35, 2, 16)]), "kind": "expert", "transposed": True},
    "twin": matrix((33, 45), [segment(45, 2, 64, "offset")], order=(1, 45)),
}
SHARED = {"twin": "salient"}
KEPT = {"norm.weight": ("F32", [5], np.array([1, -2, 0.5, 0, 3], dtype="<f4").tobytes())}
CHECKSUM = "bitfloor.shard_sha256"


def with_checksum(file: bytes) -> bytes:
    """The hash of the file with zeros in its place, put there."""
    key = f'"{CHECKSUM}":"'.encode()
    return file.replace(key + b"0" * 64, key + hashlib.sha256(file).hexdigest().encode())


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], **metadata: str) -> bytes:
    """A safetensors file: codes first, then wider elements before narrower ones, data on a multiple of 64."""
    size = {"U8": 1, "U16": 2, "F16": 2, "BF16": 2, "F32": 4}
    names = sorted(tensors, key=lambda n: (not n.endswith(".codes"), -size[tensors[n][0]]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name in names:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors[name][2] for name in names)


def main(out: Path, version: int = 1) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``expected.safetensors`` (float32 weights) to ``out``."""
    matrices = {**MATRICES, **MORE} if version else MATRICES
    numbers = Numbers(20)
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    expected: dict[str, tuple[str, list[int], bytes]] = {}
    for name, layout in matrices.items():
        parts, dense = make_matrix(numbers, layout, stores_order=name not in SHARED)
        rows, inputs = layout["shape"]
        blocks = (rows + 15) // 16
        half = {"float16": "F16", "bfloat16": "BF16"}[layout["scale_dtype"]]
        for part, data in parts.items():
            if part in ("codes", "zero"):
                described = ("U8", [blocks, len(data) // blocks])
            elif part in ("scale", "offset"):
                described = (half, [blocks, len(data) // (32 * blocks), 16])
            elif part == "channel_scale":
                described = (half, [len(data) // 2])
            else:
                unit = layout["order"]["unit"] if part == "order" else 1
                wide = -(-inputs // unit) > 256
                described = ("U16", [len(data) // 2]) if wide else ("U8", [len(data)])
            tensors[f"{name}.{part}"] = (*described, data)
        expected[name] = ("F32", [rows, inputs], dense.astype("<f4").tobytes())
    if version:
        tensors |= KEPT
    config = {
        "model_type": "golden",
        "quantization_config": {
            "quant_method": "bitfloor",
            "format_version": version,
            "layouts": list(matrices.values()),
            "matrices": {name: index for index, name in enumerate(matrices)},
            "orders": SHARED if version else {},
            "tied": {"output.weight": "embed.weight"} if version else {},
            "kept": list(KEPT) if version else [],
            "recipe": {"name": "golden", "readers": {"may": ["ignore", "this"]}} if version else {},
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    file = with_checksum(safetensors(tensors, **{CHECKSUM: "0" * 64})) if version else safetensors(tensors)
    (out / "model.safetensors").write_bytes(file)
    (out / "expected.safetensors").write_bytes(safetensors(expected))
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    for number in (0, 1):
        main(HERE / f"v{number}", number)

"""A whole decoder of the Llama family in native code (``csrc/packed/decoder.cpp``): one call a token.

What it computes is what the transformers models of these families compute, in float32, with the packed products of
:mod:`bitfloor.ops.packed_native`. This module knows matrices and vectors; which modules of a model they come from is
read in :mod:`bitfloor.runtime.native_parts`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.ops.form import Form
from bitfloor.ops.packed_native import INTEGER, POINTER, TYPES, PackedLibrary, done

NOTHING, ROW, STORED, ROUNDED = range(4)  # of the input side, shared with the matrix before


class _Parts(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("codes", "scale", "zero", "offset", "channel_scale", "order")]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("plan", POINTER),
        ("parts", _Parts),
        ("index", POINTER),
        ("channels", POINTER),
        ("dense", POINTER),
        ("type", INTEGER),
        ("bias", POINTER),
        ("rows", INTEGER),
        ("inputs", INTEGER),
        ("shared", INTEGER),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, POINTER) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        ("window", INTEGER),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((n, INTEGER) for n in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim")),
        *((n, INTEGER) for n in ("vocabulary", "positions")),
        *((n, ctypes.c_float) for n in ("epsilon", "scaling", "rope_scaling")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("norm", POINTER),
        ("frequencies", POINTER),
        ("layers", ctypes.POINTER(_Layer)),
    ]


@dataclass(frozen=True)
class MatrixParts:
    """A matrix ``[O, I]`` where it lies, packed or dense.

    Args:
        form, parts: of a packed one, see :mod:`bitfloor.ops.form`; None and empty for a dense one.
        dense: ``[O, I]`` float32, float16 or bfloat16, None for a packed one.
        bias: ``[O]``, or None.
    """

    form: Form | None
    parts: tuple[Tensor, ...] = ()
    dense: Tensor | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        if self.form is not None:
            return self.form.shape
        assert self.dense is not None
        return self.dense.shape[0], self.dense.shape[1]


@dataclass(frozen=True)
class LayerParts:
    """One layer. Norms are weights ``[D]``; those of queries and keys ``[head_dim]``, or None.

    Args:
        window: positions that a token attends to, its own among them; 0 for all before it.
    """

    q: MatrixParts
    k: MatrixParts
    v: MatrixParts
    o: MatrixParts
    gate: MatrixParts
    up: MatrixParts
    down: MatrixParts
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int

    @property
    def matrices(self) -> tuple[MatrixParts, ...]:
        """All seven."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


@dataclass(frozen=True)
class DecoderParts:
    """A decoder: its matrices where they lie, and its numbers.

    Args:
        norm: the last one's weight ``[D]``.
        frequencies: of the rotation of positions, ``[head_dim / 2]`` float32.
        heads, kv_heads, head_dim: of the attention.
        epsilon: of all norms.
        scaling: of the products of queries and keys.
        rope_scaling: of sines and cosines.
    """

    embedding: MatrixParts
    head: MatrixParts
    layers: tuple[LayerParts, ...]
    norm: Tensor
    frequencies: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    scaling: float
    rope_scaling: float


class DecoderLibrary:
    """A decoder with its cache, for one sequence. One thread at a time may run it.

    Args:
        library: the packed kernels.
        parts: read in place, and kept.
        positions: most tokens in the cache.

    Raises:
        BitfloorError: there is no memory for it, or an order is damaged.
    """

    def __init__(self, library: PackedLibrary, parts: DecoderParts, positions: int) -> None:
        functions = library.functions
        functions.bitfloor_decoder_make.argtypes = (POINTER, POINTER)
        functions.bitfloor_decoder_free.argtypes = (POINTER,)
        functions.bitfloor_decoder_run.argtypes = (POINTER, POINTER, INTEGER, INTEGER, POINTER, *(INTEGER,) * 3)
        for name in ("make", "free", "run"):
            getattr(functions, f"bitfloor_decoder_{name}").restype = INTEGER
        self._library = library
        self._kept: list[object] = []  # what the native side points to
        self.vocabulary = parts.head.shape[0]
        model, handle = self._model(parts, positions), POINTER()
        done(functions.bitfloor_decoder_make(ctypes.addressof(model), ctypes.addressof(handle)))
        self._handle = handle.value
        weakref.finalize(self, functions.bitfloor_decoder_free, self._handle)

    def run(self, ids: Sequence[int], start: int, int8: bool) -> Tensor:
        """Put tokens behind the first ``start`` of the cache; what was behind those is forgotten.

        Args:
            ids: tokens of the vocabulary, at least one, and as many as there is room for.
            start: tokens to keep.
            int8: round the inputs of the products.

        Returns:
            Logits ``[V]`` float32 behind the last of them.
        """
        logits = torch.empty(self.vocabulary, dtype=torch.float32)
        given = (INTEGER * len(ids))(*ids)
        level, threads, run = self._library.level, torch.get_num_threads(), self._library.functions.bitfloor_decoder_run
        done(run(self._handle, given, start, len(ids), logits.data_ptr(), int8, level, threads))
        return logits

    def _model(self, parts: DecoderParts, positions: int) -> _Model:
        layers = (_Layer * len(parts.layers))(*map(self._layer, parts.layers))
        self._kept.append(layers)
        first = parts.layers[0]
        shape = _Shape(
            hidden=parts.embedding.shape[1],
            intermediate=first.gate.shape[0],
            layers=len(parts.layers),
            heads=parts.heads,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            vocabulary=parts.embedding.shape[0],
            positions=positions,
            epsilon=parts.epsilon,
            scaling=parts.scaling,
            rope_scaling=parts.rope_scaling,
        )
        return _Model(
            shape,
            self._matrix(parts.embedding),
            self._matrix(parts.head),
            self._floats(parts.norm),
            self._floats(parts.frequencies),
            ctypes.cast(layers, ctypes.POINTER(_Layer)),
        )

    def _layer(self, layer: LayerParts) -> _Layer:
        found = _Layer(window=layer.window)
        for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            before: MatrixParts | None = None
            for name in group:
                matrix: MatrixParts = getattr(layer, name)
                setattr(found, name, self._matrix(matrix, shared_with(matrix, before)))
                before = matrix
        for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
            setattr(found, name, self._floats(getattr(layer, name)))
        return found

    def _matrix(self, matrix: MatrixParts, shared: int = NOTHING) -> _Matrix:
        rows, inputs = matrix.shape
        found = _Matrix(rows=rows, inputs=inputs, shared=shared, bias=self._floats(matrix.bias))
        if matrix.dense is not None:
            found.dense, found.type = self._pointer(matrix.dense), TYPES[matrix.dense.dtype]
            return found
        assert matrix.form is not None
        matrix.form.check_parts(matrix.parts, torch.device("cpu"))
        plan, (index, channels) = self._library.plan(matrix.form), self._library.index(matrix.form, matrix.parts)
        self._kept.append(plan)
        found.plan = ctypes.addressof(plan)
        found.index, found.channels = self._pointer(index), self._pointer(channels)
        given = matrix.form.named(matrix.parts)
        for name in ("codes", "scale", "zero", "offset", "channel_scale"):
            setattr(found.parts, name, self._pointer(given.get(name)))
        return found

    def _floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._pointer(tensor.detach().float())

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def shared_with(matrix: MatrixParts, before: MatrixParts | None) -> int:
    """How much of the input side two matrices behind the same input have in common."""
    if before is None or matrix.form is None or before.form is None:
        return NOTHING
    a, b = matrix.form, before.form
    given, other = a.named(matrix.parts), b.named(before.parts)

    def same(name: str) -> bool:
        one, two = given.get(name), other.get(name)
        return one is two or (one is not None and two is not None and torch.equal(one, two))

    if a.shape[1] != b.shape[1] or a.rotation != b.rotation or not same("channels"):
        return NOTHING
    cuts = [[(s.columns, s.scaled) for s in form.segments] for form in (a, b)]
    types = a.numbers[6] == b.numbers[6] or "channel_scale" not in given
    if (
        cuts[0] != cuts[1]
        or not types
        or a.numbers[2:4] != b.numbers[2:4]
        or not same("order")
        or not same("channel_scale")
    ):
        return ROW
    blocks = [[(s.bits, s.group_size) for s in form.segments] for form in (a, b)]
    return ROUNDED if blocks[0] == blocks[1] else STORED

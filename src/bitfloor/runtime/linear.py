"""Modules that hold a packed matrix: linear layers, embeddings, and a head that shares the embedding's matrix.

Their buffers are the stored tensors, named as on disk (``codes``, ``scale``, ``zero``, ``offset``, ``channel_scale``,
``order``, ``channels``), so a state dict of the model is the checkpoint. Stored tensors never change type:
``model.half()`` moves the dtype of the activations and of what stayed float, not the scales, because rounding a scale
again changes the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.formats.files import TORCH_DTYPES
from bitfloor.formats.layout import PARTS, SCALE_TYPES, Layout, part_shapes
from bitfloor.formats.native import assemble
from bitfloor.ops import packed, packed_native, reference
from bitfloor.ops.backend import activations
from bitfloor.ops.form import CONSTANT, OFFSET, PACKED

ROWS = 16
HUGE_PAGES_FROM = 1 << 22  # bytes of codes


def form_of(layout: Layout) -> list[int]:
    """A layout as the list of numbers that the operators take (:mod:`bitfloor.ops.form`)."""
    order = layout["order"] or {"unit": 0, "count": 0}
    scale_type = list(SCALE_TYPES).index(layout["scale_dtype"])
    form = [*layout["shape"], order["unit"], order["count"], layout.get("rotation", 0)]
    form += [int(bool(layout.get("channels"))), scale_type]
    for segment in layout["segments"]:
        zero = segment["zero"]
        kind = OFFSET if zero is None else PACKED if zero == "packed" else CONSTANT
        constant = (1 << segment["bits"]) - 1 if zero == "centre" else 2 * zero if kind == CONSTANT else 0
        form += [segment["columns"], segment["bits"], segment["group_size"], kind]
        form += [constant, int(segment["channel_scale"])]
    return form


class PackedMatrix(nn.Module):
    """A packed matrix ``[O, I]`` as buffers. Also the base of the modules below; on its own it holds one expert.

    Args:
        layout: its checked layout.
        dtype: dtype of the model's activations, followed by ``.to(dtype)``; not that of the scales.
        device: where the buffers are created, ``"meta"`` before loading.
        order_from: the module that stores the order of this one's columns, if it is shared.
    """

    compute: Tensor

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        order_from: PackedMatrix | None = None,
    ) -> None:
        super().__init__()
        self.attach(layout, dtype, device, order_from)

    def attach(
        self,
        layout: Layout,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        order_from: PackedMatrix | None = None,
    ) -> None:
        """Create the buffers on this module; split from ``__init__`` for modules that are converted in place."""
        self.layout = layout
        self._form = form_of(layout)
        self._order_from = () if order_from is None else (order_from,)  # a tuple hides it from the module tree
        self._caching = False
        self._dense: Tensor | None = None
        self.part_names = tuple(part_shapes(layout, with_order=order_from is None))
        for part, (type_name, shape) in part_shapes(layout, with_order=order_from is None).items():
            self.register_buffer(part, torch.zeros(shape, dtype=TORCH_DTYPES[type_name], device=device))
        # An empty tensor that .to() converts with the rest of the model: it knows the dtype to compute in.
        dtype = dtype or torch.get_default_dtype()
        self.register_buffer("compute", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.layout["shape"][0], self.layout["shape"][1]

    @property
    def weight(self) -> Tensor:
        """A stand-in with the dtype, device and shape of the float weight, for code that asks for those.

        Its values are NaN and take no memory: a model that computes with it fails visibly. Use :meth:`dense`.
        """
        shape = self.shape[::-1] if self.layout["transposed"] else self.shape
        stand_in = torch.full((), math.nan, dtype=self.compute.dtype, device=self.compute.device).expand(shape)
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then leaves it alone
        return stand_in

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by part name, the shared order included."""
        parts: dict[str, Tensor] = {name: getattr(self, name) for name in self.part_names}
        for owner in self._order_from:
            parts["order"] = owner.get_buffer("order")
        return parts

    def _part_list(self) -> list[Tensor]:
        parts = self.parts()
        return [parts[name] for name in PARTS if name in parts]

    def load_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Copy stored tensors in, by part name (what :func:`bitfloor.formats.native.encode` returns, unprefixed)."""
        for name in self.part_names:
            self.get_buffer(name).copy_(parts[name])
        self._dense = None

    def panel(self, start: int, stop: int) -> PackedWeight:
        """Rows ``start`` to ``stop`` as a packed matrix; ``start`` is a multiple of 16."""
        return self._blocks(slice(start // ROWS, -(-stop // ROWS)), stop - start)

    def packed(self) -> PackedWeight:
        """The whole matrix."""
        return self.panel(0, self.shape[0])

    def _blocks(self, index: slice, rows: int) -> PackedWeight:
        whole = ("channel_scale", "order", "channels")
        parts = {name: part if name in whole else part[index] for name, part in self.parts().items()}
        return assemble(self.layout, parts, rows)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[O, I]`` in ``dtype`` (default: that of the activations), from the cache if there is one."""
        dtype = dtype or self.compute.dtype
        if self._dense is not None and self._dense.dtype == dtype:
            return self._dense
        weight = torch.empty(self.shape, dtype=dtype, device=self.compute.device)
        for start, stop in reference.panels(*self.shape, weight.device):
            weight[start:stop] = dequantize(self.panel(start, stop), dtype)
        if self._caching:
            self._dense = weight
        return weight

    def cache_weights(self, enabled: bool = True) -> None:
        """Keep the dequantized weight after its first use (faster, at the float model's memory), or drop it."""
        self._caching = enabled
        self._dense = None

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``: ``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        if self._caching:
            return F.linear(x, self.dense(x.dtype), None if bias is None else bias.to(x.dtype))
        return packed.linear(x, self._part_list(), bias, self._form, activations())

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows ``ids [...]`` as ``[..., I]`` in the dtype of the activations; only their row blocks are read."""
        if self._dense is not None:
            return F.embedding(ids, self.dense())
        return packed.embedding(ids, self._part_list(), self._form, self.compute.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        """Move stored tensors with the model, but never convert them."""
        stored = {name: self._buffers.pop(name) for name in self.part_names}
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            assert tensor is not None
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        self._dense = None
        return self

    def extra_repr(self) -> str:
        widths = "+".join(f"{s['columns']}x{s['bits']}bit" for s in self.layout["segments"])
        rotation = self.layout.get("rotation", 0)
        turned = f", rotated by {rotation}" if rotation else ""
        return (
            f"{self.shape[1]} -> {self.shape[0]}, {widths}" + (", sorted" * bool(self.layout.get("channels"))) + turned
        )


class PackedLinear(PackedMatrix):
    """A linear layer with a packed weight and a float bias; takes the place of ``nn.Linear`` and of ``Conv1D``.

    Args:
        layout: its checked layout.
        bias: whether there is a bias parameter ``[O]``.
        dtype: see :class:`PackedMatrix`, like the rest.
    """

    def __init__(
        self,
        layout: Layout,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        order_from: PackedMatrix | None = None,
    ) -> None:
        super().__init__(layout, dtype, device, order_from)
        self.out_features, self.in_features = self.shape
        empty = torch.zeros(self.out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
        return self.matmul(x, self.bias)


class PackedEmbedding(PackedMatrix, nn.Embedding):
    """An embedding ``[V, D]`` with a packed weight; a lookup reads the rows it needs.

    Subclasses of ``nn.Embedding`` that scale the result keep doing so: see :func:`convert_embedding`.
    """

    def __init__(
        self, layout: Layout, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = layout["shape"]
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.attach(layout, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids ``[...]`` to vectors ``[..., D]`` in the dtype of the activations."""
        return self.lookup(input)


class TiedHead(nn.Module):
    """An output layer that uses the embedding's packed matrix. It owns nothing but its bias, so nothing is stored twice
    and no tying has to be restored after loading, moving or copying.

    Args:
        source: the module that holds the matrix; it must live in the same model.
        bias: bias parameter ``[V]`` of the original head, or None.
    """

    def __init__(self, source: PackedMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._source = (source,)  # a tuple hides it from the module tree
        self.out_features, self.in_features = source.shape
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """See :attr:`PackedMatrix.weight`."""
        return self._source[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., V]`` in the dtype of ``x``."""
        return self._source[0].matmul(x, self.bias)


_CONVERTED: dict[type[nn.Embedding], type[PackedEmbedding]] = {nn.Embedding: PackedEmbedding}


def convert_embedding(module: nn.Embedding, layout: Layout) -> PackedEmbedding:
    """Turn an embedding into a packed one in place, keeping its class's own ``forward`` around the lookup.

    Gemma and others subclass ``nn.Embedding`` and scale what ``super().forward`` returns. The converted class inherits
    from both, so that call reaches the packed lookup.

    Args:
        module: the embedding, usually on the meta device; its weight is dropped.
        layout: its checked layout.
    """
    original = type(module)
    if original not in _CONVERTED:
        _CONVERTED[original] = type(f"Packed{original.__name__}", (original, PackedEmbedding), {})
    weight = module._parameters.pop("weight")
    assert weight is not None
    module.__class__ = _CONVERTED[original]
    converted: Any = module
    converted.attach(layout, weight.dtype, weight.device)
    assert isinstance(converted, PackedEmbedding)
    return converted


def cache_weights(model: nn.Module, enabled: bool = True) -> None:
    """Make every packed matrix of a model keep its dequantized weight after first use, or drop those again.

    Args:
        model: any module tree.
        enabled: True costs the float model's memory and saves dequantizing at every token.
    """
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.cache_weights(enabled)


def use_huge_pages(model: nn.Module) -> None:
    """Have the codes of large matrices on huge pages where the CPU's kernels read them; no value depends on it.

    Args:
        model: any module tree.
    """
    library = packed_native.load().library
    for module in model.modules():
        if isinstance(module, PackedMatrix) and library is not None:
            codes = module.get_buffer("codes")
            if codes.device.type == "cpu" and codes.numel() >= HUGE_PAGES_FROM:
                library.ask_for_huge_pages(codes)

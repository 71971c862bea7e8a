"""The operators of packed matrices in plain torch: the definition that their kernels are tested against.

The input side puts ``x`` into stored order, once for all matrices that share it:

    stored[..., c] = (x P R)[..., order[c]] * channel_scale[c]      float32, 0 in the padding of segments

The product then knows nothing of orders, rotations and channels. With int8 activations, blocks of stored columns
(:attr:`bitfloor.ops.form.SegmentForm.activation_block`) are rounded to ``scale * q`` with ``scale = max|x| / 127``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfloor.core.basis import ordered, restored
from bitfloor.core.packed import PackedWeight, column_index, dequantize
from bitfloor.core.rotation import rotate
from bitfloor.ops import reference
from bitfloor.ops.backend import INT8
from bitfloor.ops.form import Form

LEAST = 1e-30  # what is smaller counts as nothing when activations are rounded
ROWS = 16


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, activations: str) -> Tensor:
    """``x W^T + bias``: ``[..., I]`` to ``[..., O]`` in the dtype of ``x``."""
    if activations == INT8:
        return product(stored_input(x, parts, form), parts, bias, form, activations).to(x.dtype)
    channels = form.named(parts).get("channels")
    index = None if channels is None else channels.to(torch.int64)

    def panel(start: int, stop: int) -> PackedWeight:
        return form.weight(parts, start, stop)

    return reference.linear(x, form.shape, panel, bias, form.rotation, index)


def stored_input(x: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor:
    """The input side: ``[..., I]`` to float32 ``[..., padded]``."""
    weight = form.weight(parts, 0, min(ROWS, form.shape[0]))
    x = rotate(ordered(x.float(), weight.channels), form.rotation)
    index = column_index(weight)
    x = x if index is None else x.index_select(-1, index)
    segments = []
    for segment in weight.segments:
        own = x[..., segment.start : segment.stop]
        own = own if segment.channel_scale is None else own * segment.channel_scale.float()
        segments.append(F.pad(own, (0, -segment.columns % 32)))
    return torch.cat(segments, dim=-1)


def product(stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form, activations: str) -> Tensor:
    """``[..., padded]`` as :func:`stored_input` returns it, to float32 ``[..., O]``."""
    pieces, at = [], 0
    for segment in form.segments:
        own = stored[..., at : at + segment.columns]
        pieces.append(rounded(own, segment.activation_block) if activations == INT8 else own)
        at += segment.columns + -segment.columns % 32
    x = torch.cat(pieces, dim=-1)
    out = []
    for start, stop in reference.panels(form.shape[0], x.shape[-1], x.device):
        packed = form.weight(parts, start, stop)
        plain = tuple(replace(segment, channel_scale=None) for segment in packed.segments)
        weight = dequantize(PackedWeight((stop - start, x.shape[-1]), plain))
        out.append(F.linear(x, weight, None if bias is None else bias[start:stop].float()))
    return torch.cat(out, dim=-1)


def rounded(x: Tensor, block: int) -> Tensor:
    """``x [..., K]`` float32 rounded to int8 in blocks of so many columns; the last may be short. 0 rounds nothing."""
    if not block:
        return x
    columns = x.shape[-1]
    padded = F.pad(x, (0, -columns % block))
    blocks = padded.view(*padded.shape[:-1], -1, block)
    top = blocks.abs().amax(-1, keepdim=True)
    by = torch.where(top >= LEAST, 127.0 / top, torch.zeros_like(top))
    scale = torch.where(top >= LEAST, top / 127.0, torch.zeros_like(top))
    scale = torch.where(top.isfinite(), scale, torch.full_like(scale, torch.nan))
    return (torch.round(blocks * by) * scale).flatten(-2)[..., :columns]


def embedding(ids: Tensor, parts: Sequence[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    """Rows ``ids [...]`` as ``[..., I]`` of ``dtype``; only their row blocks are read."""
    if ids.numel() == 0:
        return torch.empty(*ids.shape, form.shape[1], dtype=dtype, device=ids.device)
    blocks, inverse = torch.unique(ids // ROWS, return_inverse=True)
    names = list(form.parts)
    chosen = [
        part if name in ("channel_scale", "order", "channels") else part[blocks]
        for name, part in zip(names, parts, strict=True)
    ]
    some = replace(form, numbers=(ROWS * blocks.numel(), *form.numbers[1:]))
    return reference.packed_embedding(some.weight(chosen), inverse * ROWS + ids % ROWS, dtype)


def input_gradient(grad: Tensor, parts: Sequence[Tensor], form: Form) -> Tensor:
    """The gradient of ``x`` from that of ``x W^T``: ``[..., O]`` to ``[..., I]``, panel by panel."""
    found = grad.new_zeros(*grad.shape[:-1], form.shape[1])
    channels = None
    for start, stop in reference.panels(*form.shape, grad.device):
        packed = form.weight(parts, start, stop)
        channels = packed.channels
        found += grad[..., start:stop] @ dequantize(replace(packed, rotation=0, channels=None), grad.dtype)
    return restored(rotate(found, form.rotation), channels)

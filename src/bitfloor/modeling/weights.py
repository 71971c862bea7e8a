"""Weights on their way into a skeleton: checked, alone in their memory, put in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def set_weight(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter (never trained) or a buffer, by its full name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        module._parameters[leaf] = parameter


def own_memory(tensor: Tensor) -> Tensor:
    """The tensor alone in contiguous memory: a view left by a conversion would pin, and misalign, its source."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def all_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity. A sum carries either one through; only a suspicious sum pays for the exact test."""
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return bool(wide.sum().isfinite()) or bool(wide.isfinite().all())


def move_buffers(module: nn.Module, device: str | torch.device, *, recurse: bool = True) -> None:
    """Bring the buffers of a module to a device; they are computed tables, small and always real."""
    for part in module.modules() if recurse else (module,):
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)

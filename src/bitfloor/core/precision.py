"""The type in which matrices are multiplied while a model is quantized."""

from __future__ import annotations

import torch


def product_type(precision: str, device: str) -> torch.dtype:
    """The type of products.

    Args:
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the device has instructions for it
            (a processor without is several times slower with it), else float32.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older versions of torch do not say what the processor has.
        has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32

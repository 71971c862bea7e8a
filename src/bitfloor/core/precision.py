"""The type in which matrices are multiplied while a model is quantized."""

from __future__ import annotations

import torch


def product_type(precision: str, device: str) -> torch.dtype:
    """The type of products.

    Args:
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the device has instructions for it
            (a processor without is several times slower with it), else float32.
        device: ``"cpu"`` or ``"cuda"``, with or without a number.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = bool(bfloat16_instructions())
    return torch.bfloat16 if fast else torch.float32


def bfloat16_instructions() -> list[str]:
    """The instructions for bfloat16 products that this processor has, by torch's names."""
    # Older versions of torch do not say what the processor has.
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in ("amx_bf16", "avx512_bf16", "bf16") if has.get(name, False)]


def products_used(dtype: torch.dtype, device: str) -> str:
    """The type of products with what else decides their value: on a CPU the instructions that make them."""
    made = bfloat16_instructions() if dtype is torch.bfloat16 and torch.device(device).type == "cpu" else []
    return " ".join([str(dtype).removeprefix("torch."), *made])

"""What is installed here, and which kernels compute and why the others do not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bitfloor.ops import native, packed_native, packed_triton
from bitfloor.ops.packed_native import LEVELS

EXTRAS = {
    "gguf": ("gguf", "reading .gguf models", "pip install gguf"),
    "parquet": ("pyarrow", "reading .parquet texts", "pip install pyarrow"),
    "hub": ("datasets", "reading hf: texts", "pip install datasets"),
    "restore": ("peft", "restoring a quantized model", "pip install peft"),
    "serve": ("uvicorn", "bitfloor serve", "pip install starlette uvicorn"),
}
PACKAGES = ("bitfloor", "torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "pydantic", "numpy")
FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm", "sve")


def environment() -> dict[str, Any]:
    """Versions, processor, accelerators, kernels and optional extras, as plain data."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": {
            "machine": platform.machine(),
            "torch_level": torch.backends.cpu.get_cpu_capability(),
            "flags": [flag for flag in FLAGS if flag in _cpu_flags()],
            "threads": torch.get_num_threads(),
        },
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none found by torch",
        "kernels": {
            "reference (torch)": "active",
            "quantization (C++)": _rounding(),
            "cpu (C++)": _packed(),
            "gpu (Triton)": _gpu(),
        },
        "extras": {
            name: f"installed ({_version(module)}): {use}" if find_spec(module) else f"missing ({use}): {command}"
            for name, (module, use, command) in EXTRAS.items()
        },
    }


def _rounding() -> str:
    reason = native.loaded().reason
    return f"not used: {reason}; torch computes the same values, more slowly" if reason else "active"


def _packed() -> str:
    found = packed_native.load()
    if found.library is None:
        return f"not used: {found.reason}; torch computes from packed weights panel by panel"
    return f"active: {LEVELS[found.library.level]}"


def _gpu() -> str:
    found = packed_triton.load()
    if found.library is None:
        return f"not used: {found.reason}; on a GPU torch computes from packed weights panel by panel"
    return "active"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())

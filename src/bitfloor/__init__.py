"""bitfloor: how low can your model go? Weight-only quantization from 4 bits down, stored packed and run packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitfloor._plugin import register_with_transformers

if TYPE_CHECKING:
    from bitfloor.api import evaluate, export, load, quantize

__all__ = ["evaluate", "export", "load", "quantize"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `bitfloor --help` must not.
    if name in __all__:
        from bitfloor import api

        return getattr(api, name)
    raise AttributeError(f"module 'bitfloor' has no attribute {name!r}")

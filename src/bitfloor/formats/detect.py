"""What a path holds: a bitfloor checkpoint, a float model, another quantized format, or something else.

Reads ``config.json`` and names of files, nothing more, and imports neither torch nor transformers: the answer decides
whether an output folder may be written to and what ``inspect`` can say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.core.headers import CONFIG, WEIGHT_FILES
from bitfloor.formats.atomic import read_json
from bitfloor.formats.layout import QUANT_METHOD


class Kind(Enum):
    """What a path holds."""

    MISSING = "missing"  # nothing there
    EMPTY = "empty"  # a folder without entries
    NATIVE = "bitfloor"  # a bitfloor checkpoint
    UNFINISHED = "unfinished"  # shards or their index, and no config.json: a writer was stopped
    FLOAT = "float"  # a Hugging Face model with unquantized weights
    QUANTIZED = "quantized"  # a model quantized by something else; ``detail`` says by what
    GGUF = "gguf"  # a .gguf file
    FILE = "file"  # some other file
    OTHER = "other"  # a folder that holds something else


@dataclass(frozen=True)
class Found:
    """The answer of :func:`detect`: what it is, and a detail for the message (a format's or a file's name)."""

    kind: Kind
    detail: str = ""


def detect(path: str | os.PathLike[str]) -> Found:
    """Say what ``path`` holds.

    Raises:
        InputError: there is a ``config.json`` that cannot be read or is no JSON table.
    """
    path = Path(path)
    if not path.exists():
        return Found(Kind.MISSING)
    if path.is_file():
        return Found(Kind.GGUF if path.suffix == ".gguf" else Kind.FILE, path.name)
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise InputError(f"{path} cannot be listed: {error.strerror}; check its permissions.") from error
    if not names:
        return Found(Kind.EMPTY)
    if CONFIG in names:
        return _from_config(read_json(path / CONFIG), path / CONFIG)
    if any(WEIGHT_FILES.fullmatch(name) for name in names):
        return Found(Kind.UNFINISHED)
    return Found(Kind.OTHER, names[0])


def _from_config(config: Any, path: Path) -> Found:
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a model configuration (it is no JSON table); check the folder.")
    method = quantization_method(config)
    if method == QUANT_METHOD:
        return Found(Kind.NATIVE)
    if method is not None:
        return Found(Kind.QUANTIZED, method)
    if "model_type" in config or "architectures" in config:
        return Found(Kind.FLOAT, str(config.get("model_type", "")))
    return Found(Kind.OTHER, CONFIG)


def quantization_method(config: dict[str, Any]) -> str | None:
    """Name of the method that quantized a model, from its configuration; None for a float model."""
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    for table in nested:
        for key in ("quantization_config", "compression_config", "quantization"):
            block = table.get(key)
            if isinstance(block, dict):
                return str(block.get("quant_method") or ("mlx" if key == "quantization" else "unknown"))
    return None

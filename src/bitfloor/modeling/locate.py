"""From what the user typed to a local folder: a folder, a hub id, or a GGUF file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from bitfloor.core.errors import InputError
from bitfloor.modeling.gguf import gguf_to_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Weights, configuration and tokenizer; never pickles, never code.
_WANTED = [
    "model*.safetensors",
    "model*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "*.tiktoken",
]


def locate(source: str | os.PathLike[str], *, cache_dir: Path | None = None, remote_code: bool = False) -> Path:
    """Find (or fetch, or convert) the checkpoint folder of ``source``.

    Args:
        source: local folder, hub id, or ``.gguf`` file.
        cache_dir: where hub downloads and dequantized GGUF files are kept; None = their usual places.
        remote_code: also fetch the model's Python files.

    Raises:
        InputError: nothing there, no permission, neither folder nor GGUF, or a hub id that cannot be reached.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            if not os.access(path, os.R_OK | os.X_OK):
                raise InputError(f"no permission to read the folder {text}; check its mode and owner.")
            return path
        if path.is_file():
            if path.suffix.lower() == ".gguf":
                return gguf_to_folder(path, cache_dir)
            raise InputError(f"{text} is a file, but not a .gguf file; give a model folder, a .gguf file or a hub id.")
    except PermissionError as error:
        raise InputError(f"no permission to read {text}; check its mode and owner.") from error
    if not _HUB_ID.fullmatch(text) or path.suffix.lower() == ".gguf" or path.parent.is_dir() and "/" in text:
        raise InputError(f"the model folder {text} does not exist; give a model folder, a .gguf file or a hub id.")
    return _download(text, cache_dir, remote_code)


def _download(repo: str, cache_dir: Path | None, remote_code: bool) -> Path:
    wanted = [*_WANTED, "*.py"] if remote_code else _WANTED
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted, cache_dir=cache_dir))
    except Exception as error:  # network, permission, gated or unknown repository: the hub raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{repo} is no local folder and cannot be fetched from the hub ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a local folder."
        ) from error

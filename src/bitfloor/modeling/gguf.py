"""GGUF files: dequantized once by transformers into an ordinary checkpoint folder, then models like any other."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available
from transformers.utils import logging as hf_logging

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.places import cache_folder

logger = logging.getLogger(__name__)

_MARKER = "dequantized_from.json"


def cache_root(cache_dir: Path | None = None) -> Path:
    """Folder of dequantized GGUF models: the argument, ``BITFLOOR_CACHE``, or ``~/.cache/bitfloor``, then ``gguf``."""
    return (cache_folder() if cache_dir is None else Path(cache_dir)) / "gguf"


def gguf_to_folder(path: Path, cache_dir: Path | None = None) -> Path:
    """The float32 checkpoint folder of a GGUF file, made on first use and reused afterwards.

    The folder is built under another name and renamed when complete, so a folder of the final name is always whole.
    This is the one step of bitfloor that holds a whole float model in memory.

    Args:
        path: a local ``.gguf`` file.
        cache_dir: see `cache_root`.

    Raises:
        InputError: not a GGUF file, or one that transformers cannot dequantize.
        BitfloorError: the cache folder cannot be written.
    """
    digest = _sha256(path)
    if not is_gguf_available():
        raise InputError(f"reading {path} needs the gguf package; install it with: pip install gguf.")
    folder = cache_root(cache_dir) / digest[:16]
    if (folder / _MARKER).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{digest[:16]}-", dir=folder.parent))
    except OSError as error:
        raise BitfloorError(
            f"cannot write the cache folder {folder.parent} ({error.strerror}); set BITFLOOR_CACHE to another."
        ) from error
    logger.warning("dequantizing %s, once, into %s (4 bytes a parameter)", path.name, folder)
    try:
        _dequantize(path, scratch)
        marker = {"file": path.name, "sha256": digest, "dtype": "float32"}
        (scratch / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        if not (folder / _MARKER).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
    except OSError as error:
        if not (folder / _MARKER).is_file():  # otherwise another process was faster, with the same bytes
            raise BitfloorError(
                f"cannot write the dequantized model to {folder} ({error}); set BITFLOOR_CACHE to another folder."
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} does not begin with the GGUF mark; it is damaged or another kind of file.")
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _dequantize(path: Path, folder: Path) -> None:
    bar, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        # The dequantizer draws its own progress bar; what goes wrong comes as an exception, so nothing is lost.
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # transformers marks the model as GGUF-quantized; without this save_pretrained refuses.
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers and gguf raise many kinds on unknown or damaged files
        if isinstance(error, OSError) and error.errno is not None:  # the system's own: no space, no permission
            raise
        known = isinstance(error, (ValueError, NotImplementedError, OSError)) and "GGUF" in str(error).upper()
        reason = str(error).strip().splitlines()[0].rstrip(".") if known else "it is damaged, or of an unknown kind"
        raise InputError(
            f"{path} cannot be dequantized by transformers ({reason}); give the float model instead."
        ) from error
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()

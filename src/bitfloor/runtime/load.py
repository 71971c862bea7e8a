"""Whole models to run: a float one or a packed one, behind one function. Quantization never needs a whole one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from bitfloor.core.errors import InputError
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.formats.detect import Kind, detect
from bitfloor.modeling.loader import open_source
from bitfloor.modeling.locate import locate
from bitfloor.runtime.hf import load_packed


def load_model(
    model: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model of transformers, from a float folder, hub id or ``.gguf`` file, or a packed folder.

    Args:
        model: what to load.
        device: where to put it.
        dtype: of activations and float weights; ``"auto"`` takes the stored one.
        trust_remote_code: allow Python code that comes with the model.

    Raises:
        InputError: nothing usable there, with the reason.
    """
    if is_packed(model):
        return load_packed(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    # Opening it as a source first turns every kind of bad input into a sentence.
    source = open_source(model, trust_remote_code=trust_remote_code)
    source.check_finite()
    folder = source.path
    logging.disable_progress_bar()  # it would write over the command line's own progress
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
    )
    return loaded.to(device).eval()


def is_packed(model: str | os.PathLike[str]) -> bool:
    """Whether a path holds a bitfloor checkpoint (anything else, hub ids included, is a float model or an error)."""
    return detect(model).kind is Kind.NATIVE


def check_model(model: str | os.PathLike[str], *, trust_remote_code: bool = False) -> None:
    """Refuse a model that cannot be loaded, from its configuration and headers, before anything expensive.

    Raises:
        InputError: the reason.
    """
    if is_packed(model):
        read_checkpoint(model)
    else:
        open_source(model, trust_remote_code=trust_remote_code)


def load_tokenizer(model: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a model.

    Raises:
        InputError: there is none.
    """
    folder = Path(model) if is_packed(model) else locate(model, remote_code=trust_remote_code)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizer classes raise many kinds on missing or damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
        message = f"{folder} has no usable tokenizer ({reason}); put tokenizer.json beside the weights."
        raise InputError(message) from error
    return tokenizer

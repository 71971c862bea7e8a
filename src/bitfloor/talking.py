"""Opening a model to make text with: the part of the API that joins a folder, a device and a backend (L5)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from bitfloor.ops.backend import AUTO, FLOAT, REFERENCE, activations
from bitfloor.ops.choice import computing, multiplies_packed
from bitfloor.runtime.linear import cache_weights
from bitfloor.runtime.load import load_model, load_tokenizer
from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.text_model import Generation, TextModel, generate_text

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Compute:
    """What to compute with.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``, see :func:`bitfloor.ops.choice.computing`.
        activations: ``"float"`` or ``"int8"``; None as ``BITFLOOR_BACKEND`` says.
        trust_remote_code: allow Python code that comes with the model.
    """

    device: str = "cpu"
    backend: str = AUTO
    activations: str | None = None
    trust_remote_code: bool = False


def open_text_model(model: AnyPath, compute: Compute, *, context: int | None = None) -> TextModel:
    """Load a packed or float model and its tokenizer.

    Args:
        model: a bitfloor checkpoint; a float folder, hub id or ``.gguf`` file is read too.
        compute: on what, and by which kernels.
        context: most tokens to hold; None for what the model was made for.

    Raises:
        InputError: nothing usable there, or kernels that are not there.
    """
    chosen = computing(compute.backend, compute.activations, compute.device)
    loaded, tokenizer = _load(model, compute, chosen)
    return TextModel(loaded, tokenizer, context=context, computing=chosen)


def continue_text(model: AnyPath, prompt: str, settings: Settings, compute: Compute, *, chat: bool) -> Generation:
    """Load a model and continue one prompt, see :func:`bitfloor.runtime.text_model.generate_text`.

    Raises:
        InputError: nothing usable there, kernels that are not there, or a prompt that cannot be continued.
    """
    chosen = computing(compute.backend, compute.activations, compute.device)
    loaded, tokenizer = _load(model, compute, chosen)
    return generate_text(loaded, tokenizer, prompt, settings, chat=chat, computing=chosen)


def _load(model: AnyPath, compute: Compute, chosen: Callable[[], AbstractContextManager[None]]) -> tuple[Any, Any]:
    dtype = torch.float32 if torch.device(compute.device).type == "cpu" else "auto"
    loaded = load_model(model, device=compute.device, dtype=dtype, trust_remote_code=compute.trust_remote_code)
    with chosen():
        rounds = activations() != FLOAT
    if not multiplies_packed(compute.device) and not rounds and compute.backend != REFERENCE:
        cache_weights(loaded, True)  # without kernels a step would unpack every matrix anew
    return loaded, load_tokenizer(model, trust_remote_code=compute.trust_remote_code)

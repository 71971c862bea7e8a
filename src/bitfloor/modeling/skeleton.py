"""A model without its weights: the Hugging Face module built from config.json, parameters on meta, buffers real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bitfloor.core.errors import InputError
from bitfloor.modeling.shards import read_json

# Heads of models that do not predict the next token from the tokens before it.
_OTHER_HEADS = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json and refuse what is not a float, decoder-only language model.

    Args:
        folder: local checkpoint folder.
        trust_remote_code: allow configuration code that lies in the checkpoint.

    Raises:
        InputError: no config, unknown architecture, an encoder, an encoder-decoder or an already quantized model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; a Hugging Face model folder is needed.")
    raw = read_json(path)
    _refuse_quantized(path, raw)
    names = [str(n) for n in raw.get("architectures") or []]
    if raw.get("is_encoder_decoder"):
        raise InputError(
            f"{folder} is an encoder-decoder model ({_first(names, raw)}); bitfloor quantizes decoder-only models."
        )
    for name in names:
        if name.endswith(_OTHER_HEADS):
            raise InputError(
                f"{folder} is a {name}, not a causal language model; bitfloor quantizes decoder-only models."
            )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model's own configuration class raises on bad values
        raise InputError(
            f"{path} describes no model transformers can build ({_line(error)}); check the file, or pass "
            "trust_remote_code "
            "if the model brings its own code and you trust it."
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{folder} is an encoder-decoder model ({_first(names, raw)}); bitfloor quantizes decoder-only models."
        )
    return config


def _refuse_quantized(path: Path, raw: dict[str, Any]) -> None:
    nested = [raw, *(v for v in raw.values() if isinstance(v, dict))]
    for part in nested:
        quantized = part.get("quantization_config") or part.get("compression_config")
        if quantized:
            method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
            raise InputError(f"{path} says the model is already quantized with {method}; give the float model instead.")


def build_skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the untouched module in eval mode: parameters on meta (float32), buffers computed, no random state used.

    The attention implementation is transformers' own default for the model, so replay and reference agree. Experts run
    one by one ("eager"), the only implementation in which each expert's input can be seen.

    Raises:
        InputError: transformers has no causal language model for this configuration.
    """
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model's own constructor raises on bad values
        raise InputError(
            f"transformers cannot build a causal language model of type {config.model_type}: {_line(error)}."
        ) from error
    # BERT and its family also come as "language models"; their blocks carry this switch, off unless made a decoder.
    if any(getattr(module, "is_decoder", None) is False for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} is an encoder, not a causal language model; bitfloor quantizes "
            "decoder-only models."
        )
    model.tie_weights()
    model.requires_grad_(False)
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        part._experts_implementation = "eager"
    return model.eval()


def _first(names: list[str], raw: dict[str, Any]) -> str:
    return names[0] if names else str(raw.get("model_type", "unknown type"))


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

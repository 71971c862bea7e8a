"""Text from a model: a plain continuation of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.modeling.context import context_length


@dataclass(frozen=True)
class Generation:
    """What came out.

    Args:
        text: the new text only, special tokens left out.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens made.
        stopped: ``"end"`` (the model ended the text), ``"length"`` (max_new_tokens reached) or ``"context"`` (the
            model's context is full).
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    stopped: str


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> Generation:
    """Continue ``prompt``.

    Greedy unless ``temperature`` is positive: the model's own sampling settings are not used, so that two models are
    compared on the same terms. The prompt is continued as it stands; no chat template is applied unless ``chat``.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        prompt: empty lets the model begin from its start token.
        max_new_tokens: at least 1; fewer are made when the context is full or the model ends the text.
        temperature: 0 for greedy, otherwise sampling from the whole distribution at this temperature.
        seed: of the sampling; the global random state is left as it was.
        chat: wrap the prompt as one user message by the tokenizer's chat template.

    Raises:
        InputError: a number out of range, a prompt that leaves no room in the context, an empty prompt for a model
            without a start token, or ``chat`` without a template.
        BitfloorError: the model gives logits that are not finite.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens} makes no text; use at least 1.")
    if not temperature >= 0.0:
        raise InputError(f"temperature = {temperature} is no temperature; use 0 for greedy, or a positive number.")
    ids = _prompt_ids(model, tokenizer, prompt, chat)
    limit = context_length(model)
    room = max_new_tokens if limit is None else limit - len(ids)
    if room < 1:
        raise InputError(
            f"The prompt has {len(ids):,} tokens and the model's context holds {limit:,}, so there is no room for a "
            "new one; shorten the prompt."
        )
    count = min(max_new_tokens, room)
    new = _sample(model, ids, _settings(model, tokenizer, count, temperature), seed)
    ended = bool(new) and new[-1] in _end_tokens(model, tokenizer)
    stopped = "end" if ended else "length" if count == max_new_tokens else "context"
    return Generation(_continuation(tokenizer, ids, new), len(ids), len(new), stopped)


class _RefuseNonFinite(LogitsProcessor):
    """Greedy decoding would silently turn NaN into some token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.amax(dim=-1)).all():  # -inf alone is a masked token
            raise BitfloorError("The model gives NaN or infinite logits; its weights are damaged.")
        return scores


def _prompt_ids(model: Any, tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("This model's tokenizer has no chat template; generate without it.")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if ids:
        return ids
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.bos_token_id):
        if start is not None:
            return [int(start)]
    raise InputError("The prompt is empty and this model has no start token; give at least one word.")


def _continuation(tokenizer: Any, ids: list[int], new: list[int]) -> str:
    """The new tokens' text as it follows the prompt: some tokenizers drop the space a decoded text begins with."""
    before = tokenizer.decode(ids, skip_special_tokens=True)
    whole = tokenizer.decode([*ids, *new], skip_special_tokens=True)
    text: str = (
        whole[len(before) :] if before and whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
    )
    return text


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The generation config's end tokens (a chat model may have several), else the tokenizer's."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if declared is None:
        declared = tokenizer.eos_token_id
    if declared is None:
        return []
    return list(declared) if isinstance(declared, (list, tuple)) else [int(declared)]


def _settings(model: Any, tokenizer: Any, count: int, temperature: float) -> GenerationConfig:
    ends = _end_tokens(model, tokenizer)
    # Padding is never used with one prompt, but transformers warns when there is no token for it.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0.0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(max_new_tokens=count, eos_token_id=ends or None, pad_token_id=pad, **options)


def _sample(model: Any, ids: list[int], settings: GenerationConfig, seed: int) -> list[int]:
    device = next(iter([*model.parameters(), *model.buffers()])).device
    prompt = torch.tensor([ids], device=device)
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()
    own = model.generation_config
    model.generation_config = GenerationConfig()  # else its sampling settings are merged into ours
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out: Tensor = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_RefuseNonFinite()]),
            )
    finally:
        model.generation_config = own
        model.train(was_training)
    return [int(token) for token in out[0, len(ids) :]]

"""Tiny models with tokenizers, random weights, that make text: of one token a word, or of one token a byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from trained import VOCABULARY as BYTES
from trained import byte_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 48
CONTEXT = 32
# Each message on a line of its own. It refuses a conversation that begins with an answer, as real templates do.
TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('a user speaks first') }}{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_llama(seed: int, **changes: Any) -> LlamaForCausalLM:
    """Two blocks of 16 channels; the global random state is left as it was."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.5,  # wide enough that the predictions differ clearly from token to token
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """``w0`` to ``w44``, joined by spaces."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": 3 + i for i in range(VOCABULARY - 3)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def never_ends(model: Any) -> Any:
    """A model whose texts have predictable lengths: no token ends them."""
    model.generation_config = GenerationConfig(eos_token_id=None)
    return model


def save_speaker(folder: Path, *, context: int = 512, template: str | None = TEMPLATE) -> Path:
    """A float model of bytes, with a chat template or without, that speaks printable text until it is stopped."""
    model = make_llama(0, vocab_size=BYTES, max_position_embeddings=context, bos_token_id=None, eos_token_id=256)
    tokenizer = byte_tokenizer()
    printable = {ids[0] for letter in map(chr, range(32, 127)) if len(ids := tokenizer(letter)["input_ids"]) == 1}
    with torch.no_grad():
        # The logits of all else are zero, and of 95 random ones some are far above.
        for token in range(BYTES):
            if token not in printable:
                model.lm_head.weight[token] = 0.0
        model.lm_head.weight[:] *= 4.0
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder

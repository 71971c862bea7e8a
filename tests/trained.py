"""A pico Llama that was really trained, so that rounding its weights costs what rounding costs a real model.

Random weights cannot show that a better method gives a better model: every output of theirs is noise. This one learns
to spell Python's own documentation in a few seconds on one core, from text that lies on every machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitfloor.data.offline import default_documents

END = "<|end|>"
VOCABULARY = 257  # the 256 bytes and END: an odd number of rows, so the last tile of the embedding is short
CONTEXT = 256
STEPS, BATCH, LENGTH = 300, 12, 64
RATE = 1e-2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; nothing is learned or downloaded."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))} | {END: 256}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def trained_config() -> LlamaConfig:
    """64 channels and 176 inside: the second is no multiple of 32, 48 or 64."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,  # the usual 0.02 takes twice as many steps at this width
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )


def train_llama(seed: int = 0) -> Any:
    """Train on the calibration part of the default text; the evaluation part stays unseen."""
    tokenizer = byte_tokenizer()
    text = "\n\n".join(default_documents("calibration"))[: STEPS * BATCH * LENGTH]
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(trained_config())
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
            batch = windows[torch.randint(len(windows), (BATCH,))]
            logits = model(input_ids=batch, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval().requires_grad_(False)


def save_trained(folder: Path) -> Path:
    """Train and save as an ordinary Hugging Face folder, tokenizer included."""
    train_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder

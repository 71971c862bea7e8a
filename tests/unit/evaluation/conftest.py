"""Pico models made from a config, and a tokenizer of one token a word."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 48
CONTEXT = 32


def make_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,  # wide enough that the predictions differ clearly from token to token
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama() -> Callable[[int], LlamaForCausalLM]:
    return make_llama


@pytest.fixture(scope="session")
def windows() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": 3 + i for i in range(VOCABULARY - 3)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

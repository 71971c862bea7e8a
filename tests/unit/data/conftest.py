"""A tokenizer built in the test: one token a word, so that counts in the tests can be read off the text."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def build(*, bos: bool) -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": 3 + i for i in range(97)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return build(bos=False)


@pytest.fixture(scope="session")
def words_with_start() -> PreTrainedTokenizerFast:
    return build(bos=True)

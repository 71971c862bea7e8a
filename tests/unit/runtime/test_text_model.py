"""Text from a whole model: the same tokens as transformers makes, ended by what should end it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speaking import TEMPLATE, make_llama, never_ends, word_tokenizer
from transformers import GenerationConfig

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.text_model import Generation, TextModel, generate_text


def make(model: Any, prompt: str, tokenizer: Any = None, *, chat: bool = False, **settings: Any) -> Generation:
    return generate_text(model, tokenizer or word_tokenizer(), prompt, Settings(**settings), chat=chat)


def endless() -> tuple[Any, Any]:
    words = word_tokenizer()
    words.eos_token = None
    return never_ends(make_llama(3)), words


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Argmax by full forward passes, without a cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_equals_repeated_argmax() -> None:
    model, words = endless()
    made = make(model, "w1 w2 w3", words, max_new_tokens=6)
    expected = greedy(model, [4, 5, 6], 6)[3:]
    assert made.text == " " + words.decode(expected, skip_special_tokens=True)  # as it follows the prompt
    assert (made.prompt_tokens, made.new_tokens, made.stopped) == (3, 6, "length")


def test_the_model_s_sampling_settings_are_not_used() -> None:
    model = make_llama(3)
    plain = make(model, "w1 w2", max_new_tokens=8)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, eos_token_id=1)
    own = model.generation_config
    assert make(model, "w1 w2", max_new_tokens=8) == plain
    assert model.generation_config is own


def test_end_token_stops() -> None:
    model = make_llama(3)
    first = greedy(model, [4, 5], 4)[2]
    model.generation_config = GenerationConfig(eos_token_id=[1, first])  # a chat model has several
    result = make(model, "w1 w2", max_new_tokens=8)
    # The token is a word of this tokenizer, and the text ends before it all the same.
    assert (result.text, result.new_tokens, result.stopped) == ("", 1, "end")


def test_context_bounds_the_text() -> None:
    model, words = endless()
    result = make(model, " ".join(["w1"] * 30), words, max_new_tokens=8)
    assert (result.prompt_tokens, result.new_tokens, result.stopped) == (30, 2, "context")
    assert make(model, " ".join(["w1"] * 30), words, max_new_tokens=None).stopped == "context"
    with pytest.raises(InputError, match="prompt has 32 tokens and the model's context holds 32"):
        make(model, " ".join(["w1"] * 32), words)
    with pytest.raises(InputError, match="a context of 1 tokens"):
        TextModel(model, words, context=1)
    assert TextModel(model, words, context=20).context == 20


def test_empty_prompt_begins_from_the_start_token() -> None:
    model, words = make_llama(3), word_tokenizer()
    assert make(model, "", words, max_new_tokens=3).prompt_tokens == 1
    words.bos_token = None
    assert make(model, "", words, max_new_tokens=3).prompt_tokens == 1
    words.eos_token = None
    model.config.bos_token_id = None
    with pytest.raises(InputError, match="prompt is empty"):
        make(model, "", words)


def test_sampling_repeats_with_its_seed_and_leaves_the_global_state() -> None:
    model, words = endless()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    texts = [make(model, "w1", words, max_new_tokens=16, temperature=1.5, seed=s).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_chat_template_only_when_asked() -> None:
    model, words = make_llama(3), word_tokenizer()
    with pytest.raises(InputError, match="no chat template"):
        make(model, "w1", words, chat=True)
    words.chat_template = "{% for m in messages %}w9 {{ m['content'] }} w9{% endfor %}"
    assert make(model, "w1", words, max_new_tokens=1, chat=True).prompt_tokens == 3
    assert make(model, "w1", words, max_new_tokens=1).prompt_tokens == 1


def test_a_template_that_refuses_says_why() -> None:
    words = word_tokenizer()
    words.chat_template = TEMPLATE
    talks = TextModel(make_llama(3), words)
    with pytest.raises(InputError, match=r"refuses these messages: a user speaks first\.$"):
        talks.encode_chat([{"role": "assistant", "content": "w1"}])
    words.chat_template = "{% if true %}"
    with pytest.raises(InputError, match="refuses these messages"):
        talks.encode_chat([{"role": "user", "content": "w1"}])
    words.chat_template = "{{ '' }}"
    with pytest.raises(InputError, match="makes nothing"):
        talks.encode_chat([{"role": "user", "content": "w1"}])


def test_ids_are_checked() -> None:
    talks = TextModel(make_llama(3), word_tokenizer())
    talks.check_ids([0, 47])
    for ids, message in (([], "no tokens"), ([48], "Token id 48 is outside"), ([-1], "Token id -1")):
        with pytest.raises(InputError, match=message):
            talks.check_ids(ids)


def test_the_next_turn_is_read_from_where_it_differs() -> None:
    model, words = endless()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    talks = TextModel(model, words)
    list(talks.stream([4, 5, 6], Settings(max_new_tokens=3)))
    assert seen == [3, 1, 1]
    made = talks._tape.ids[3:]
    del seen[:]
    again = list(talks.stream([4, 5, 6, *made, 9, 10], Settings(max_new_tokens=1)))
    assert seen == [2] and again[-1].ended == "length"
    del seen[:]
    list(talks.stream([4, 5, 7], Settings(max_new_tokens=1)))
    list(talks.stream([4, 5, 7], Settings(max_new_tokens=1)))  # nothing new but the logits of the last
    assert seen == [1, 1]


def test_damaged_model_fails_the_run() -> None:
    model = make_llama(3)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(BitfloorError, match="NaN"):
            make(model, "w1", max_new_tokens=2, temperature=temperature)


def test_a_model_in_training_is_left_in_training() -> None:
    model = make_llama(3).train()
    make(model, "w1", max_new_tokens=1)
    assert model.training

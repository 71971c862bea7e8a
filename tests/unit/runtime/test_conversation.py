"""A conversation remembers its turns, and forgets the oldest ones when they no longer fit."""

from __future__ import annotations

import pytest
from speaking import TEMPLATE, make_llama, never_ends, word_tokenizer

from bitfloor.core.errors import InputError
from bitfloor.runtime.conversation import Conversation
from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.text_model import TextModel

# One token for every word, so lengths can be counted: a turn is "w3" and its question, "w4" and its answer.
COUNTED = (
    "{% for m in messages %}{{ {'system': 'w2', 'user': 'w3', 'assistant': 'w4'}[m['role']] }} {{ m['content'] }} "
    "{% endfor %}w4"
)
FOUR = Settings(max_new_tokens=4)


def counted(context: int = 32) -> TextModel:
    words = word_tokenizer()
    words.chat_template = COUNTED
    return TextModel(never_ends(make_llama(3)), words, context=context)


def ask(conversation: Conversation, text: str, settings: Settings = FOUR) -> str:
    return "".join(piece.text for piece in conversation.ask(text, settings))


def test_turns_are_remembered_until_a_reset() -> None:
    conversation = Conversation(counted(), "w5 w6")
    first = ask(conversation, "w1")
    assert conversation.prompt_tokens == 3 + 2 + 1 and len(first.split()) == 4
    ask(conversation, "w1 w2")
    assert conversation.prompt_tokens == 3 + (2 + 5) + 3 + 1
    conversation.reset()
    assert ask(conversation, "w1") == first and conversation.prompt_tokens == 6


def test_a_later_turn_reads_only_what_is_new() -> None:
    model = counted()
    seen: list[int] = []
    hook = lambda _, __, given: seen.append(given["input_ids"].shape[1])  # noqa: E731
    model._model.register_forward_pre_hook(hook, with_kwargs=True)
    conversation = Conversation(model)
    ask(conversation, "w1")
    assert seen == [3, 1, 1, 1]
    del seen[:]
    ask(conversation, "w7")
    assert seen == [1 + 2 + 1, 1, 1, 1]  # the last token of the answer was never read; a question; where to answer


def test_the_oldest_turns_are_forgotten() -> None:
    conversation = Conversation(counted(32), "w5 w6")
    for text in ("w1", "w2", "w7"):
        assert conversation.forget_for(text, FOUR) == 0
        ask(conversation, text)
    assert conversation.prompt_tokens == 3 + 7 + 7 + 3
    assert conversation.forget_for("w8", FOUR) == 0
    ask(conversation, "w8")
    # Four turns would make 3 + 28 + 5 tokens, three 29, and of 32 four are kept for the answer.
    assert conversation.forget_for("w9 w9 w9", FOUR) == 2
    assert [question for question, _ in conversation.turns] == ["w7", "w8"]
    ask(conversation, "w9 w9 w9")
    assert conversation.prompt_tokens == 3 + 7 + 7 + 5


def test_a_message_that_never_fits_forgets_nothing() -> None:
    conversation = Conversation(counted(32))
    ask(conversation, "w1")
    with pytest.raises(InputError, match="prompt has 32 tokens and the model's context holds 32"):
        conversation.forget_for(" ".join(["w1"] * 30), FOUR)
    assert len(conversation.turns) == 1
    assert conversation.forget_for(" ".join(["w1"] * 29), FOUR) == 1  # fits alone, with less room than promised
    assert len(ask(conversation, " ".join(["w1"] * 29)).split()) == 1


def test_an_answer_that_is_given_up_stays_in_the_conversation() -> None:
    conversation = Conversation(counted())
    said: list[str] = []
    for piece in conversation.ask("w1", FOUR, cancelled=lambda: len(said) >= 2):
        said.append(piece.text)
    assert conversation.turns == [("w1", "".join(said))] and len("".join(said).split()) == 2


def test_a_model_that_cannot_talk_is_refused() -> None:
    words = word_tokenizer()
    with pytest.raises(InputError, match="no chat template"):
        Conversation(TextModel(make_llama(3), words))
    words.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    Conversation(TextModel(make_llama(3), words))
    with pytest.raises(InputError, match="refuses these messages: no system"):
        Conversation(TextModel(make_llama(3), words), "w1")

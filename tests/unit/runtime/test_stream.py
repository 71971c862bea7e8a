"""Text comes in pieces that are certain, and stops where it should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pico import VOCAB, pico_model
from speaking import make_llama, never_ends, word_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from trained import byte_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from bitfloor.runtime.decode import open_decoder
from bitfloor.runtime.detokenize import BROKEN, StopStrings, TextStream
from bitfloor.runtime.sampling import Settings
from bitfloor.runtime.stream import PIECE, Piece, Tape, stream_text, stream_tokens

BYTES = byte_tokenizer()
# Halves of surrogate pairs are no characters.
CHARACTERS = st.characters(exclude_characters=BROKEN, exclude_categories=("Cs",))
BEYOND_ASCII = st.characters(exclude_characters=BROKEN, exclude_categories=("Cs",), min_codepoint=128)


def bytes_with_fallback() -> PreTrainedTokenizerFast:
    """As Llama has them: words that begin with a mark for the space, and bytes for what is no word."""
    words = ["<s>", "\u2581the", "\u2581cat", "s", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


FALLBACK = bytes_with_fallback()


def pieces_of(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.push, ids), stream.flush()]


@given(st.text(alphabet=CHARACTERS, max_size=40), st.text(max_size=5))
def test_characters_come_whole(text: str, before: str) -> None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(BYTES, BYTES(before, add_special_tokens=False)["input_ids"], ids)
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)


@given(st.text(alphabet=BEYOND_ASCII, max_size=12))
def test_characters_of_fallback_bytes_come_whole(text: str) -> None:
    ids = [5 + byte for byte in text.encode()]
    pieces = pieces_of(FALLBACK, [1], ids)
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)


@given(st.integers(0, 20), st.text(alphabet="\u00e9\u20ac\U0001f600", min_size=1, max_size=8))
def test_a_prompt_that_is_cut_inside_a_character_does_no_harm(more: int, text: str) -> None:
    prompt = [1, *(5 + byte for byte in ("\u20ac" * 8 + "x" * more).encode())]
    assert "".join(pieces_of(FALLBACK, prompt, [5 + byte for byte in text.encode()])) == text


def test_an_unfinished_character_at_the_end_is_left_out() -> None:
    ids = BYTES("a\u20ac", add_special_tokens=False)["input_ids"]
    assert pieces_of(BYTES, [], ids[:-1]) == ["a", "", "", ""]
    assert pieces_of(FALLBACK, [1], [5 + byte for byte in "\u20ac\u20ac".encode()][:-1]) == [
        "",
        "",
        "\u20ac",
        "",
        "",
        "",
    ]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_for_ever() -> None:
    stray = BYTES.convert_tokens_to_ids(
        next(t for t in BYTES.get_vocab() if BYTES.decode(BYTES.convert_tokens_to_ids([t])) == BROKEN)
    )
    pieces = pieces_of(BYTES, [], [stray] * 100)
    assert "".join(pieces[:64]).count(BROKEN) >= 32


def test_spaces_before_words_are_right() -> None:
    the, cat, s = 1, 2, 3
    assert pieces_of(FALLBACK, [the], [cat, s, the]) == [" cat", "s", " the", ""]
    assert pieces_of(FALLBACK, [0], [cat, the]) == ["cat", " the", ""]  # nothing is before it but a special token
    assert pieces_of(FALLBACK, [the, *[0] * 5], [cat]) == [" cat", ""]
    words = word_tokenizer()
    assert pieces_of(words, [3], [4, 1, 5]) == [" w1", "", " w2", ""]


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stop_strings_are_found_wherever_the_pieces_are_cut(text: str, strings: list[str], data: st.DataObject) -> None:
    stops = StopStrings(strings)
    out, rest = "", text
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        out += stops.push(rest[:count])
        rest = rest[count:]
        assert text.startswith(out)
    out += stops.flush()
    # The first place where any string is complete; of several that end there, all text before the earliest.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(string) for string in strings)]
    assert stops.found == bool(ends)
    assert not any(string in out for string in strings)
    assert out == text if not ends else text[: ends[0]].startswith(out)


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["###", "END"])
    assert [stops.push(text) for text in ("a#", "#b", "E", "N", "x", "EN", "Dcd")] == [
        "a",
        "##b",
        "",
        "",
        "ENx",
        "",
        "",
    ]
    assert stops.found and stops.push("more") == "" and stops.flush() == ""


def talking() -> tuple[Tape, PreTrainedTokenizerFast]:
    return Tape(open_decoder(never_ends(make_llama(3)))), word_tokenizer()


# Full attention, sliding windows of 6, learned positions, ALiBi, experts; forty tokens go round every window.
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "opt", "gpt2", "falcon_alibi", "mixtral", "gpt_oss"])
def test_greedy_equals_transformers(name: str) -> None:
    model = never_ends(pico_model(name))
    prompt = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
    settings = GenerationConfig(max_new_tokens=40, do_sample=False, pad_token_id=0)
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    found = stream_tokens(Tape(open_decoder(model)), prompt[0].tolist(), Settings(max_new_tokens=40))
    assert list(found) == expected[0, 9:].tolist()


def test_every_token_gives_a_piece_and_the_last_says_why() -> None:
    tape, words = talking()
    pieces = list(stream_text(tape, words, [4, 5, 6], Settings(max_new_tokens=5)))
    assert [piece.new_tokens for piece in pieces] == [1, 2, 3, 4, 5, 5]
    assert [piece.ended for piece in pieces] == [None] * 5 + ["length"]


def test_a_stop_string_ends_the_text_and_is_not_in_it() -> None:
    tape, words = talking()
    whole = "".join(piece.text for piece in stream_text(tape, words, [4], Settings(max_new_tokens=8)))
    third = whole.split()[2]
    pieces = list(stream_text(tape, words, [4], Settings(max_new_tokens=8, stop=(third,))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(third)]
    assert pieces[-1].ended == "stop" and pieces[-1].new_tokens <= 3


def test_a_stop_string_that_never_came_is_not_lost() -> None:
    tape, words = talking()
    whole = "".join(piece.text for piece in stream_text(tape, words, [4], Settings(max_new_tokens=4)))
    pieces = list(stream_text(tape, words, [4], Settings(max_new_tokens=4, stop=(whole[-2:] + "!",))))
    assert "".join(piece.text for piece in pieces) == whole and pieces[-1].ended == "length"


def test_cancelled_between_tokens_and_goes_on_afterwards() -> None:
    tape, words = talking()
    whole = list(stream_tokens(tape, [4, 5], Settings(max_new_tokens=6)))
    said: list[Piece] = []
    for piece in stream_text(tape, words, [4, 5], Settings(max_new_tokens=6), cancelled=lambda: len(said) >= 2):
        said.append(piece)
    assert said[-1].ended == "cancelled" and said[-1].new_tokens == 2
    assert list(stream_tokens(tape, [4, 5], Settings(max_new_tokens=6))) == whole


def test_a_long_prompt_can_be_given_up() -> None:
    model = never_ends(make_llama(3, max_position_embeddings=4 * PIECE))
    tape = Tape(open_decoder(model))
    ids = torch.randint(3, 48, (3 * PIECE,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = iter([False, True])
    assert list(stream_tokens(tape, ids, Settings(), cancelled=lambda: next(asked))) == []
    assert tape.decoder.length == len(tape.ids) == PIECE
    assert len(list(stream_tokens(tape, ids, Settings(max_new_tokens=2)))) == 2
    assert tape.ids[: len(ids)] == ids


def test_computing_is_entered_for_every_step_and_never_seen_outside() -> None:
    inside: list[bool] = []

    @contextmanager
    def computing() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    tape = Tape(open_decoder(never_ends(make_llama(3))), computing)
    for _ in stream_tokens(tape, [4, 5], Settings(max_new_tokens=3)):
        assert not inside[-1]
    assert inside.count(True) == 4  # truncate, prefill, two steps


def test_an_interrupted_step_leaves_the_tape_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    tape, _ = talking()
    whole = list(stream_tokens(tape, [4, 5], Settings(max_new_tokens=4)))
    step = tape.decoder.step

    def interrupted(token: int) -> torch.Tensor:
        step(token)  # the decoder has it, the tape does not know yet
        raise KeyboardInterrupt

    monkeypatch.setattr(tape.decoder, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream_tokens(tape, [4, 5], Settings(max_new_tokens=4)))
    monkeypatch.undo()
    assert list(stream_tokens(tape, [4, 5], Settings(max_new_tokens=4))) == whole

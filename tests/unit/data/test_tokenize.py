import pytest
import torch

from bitfloor.core.errors import InputError
from bitfloor.data.sources import make_source
from bitfloor.data.tokenize import calibration_batches, evaluation_windows, token_sha256


def doc(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def ids(*numbers: int) -> list[int]:
    return [3 + n for n in numbers]


SOURCE = make_source("docs", [doc(*range(10)), doc(1), doc(*range(20, 24)), doc(*range(30, 33)), doc(*range(40, 60))])


def test_documents_mode_takes_the_first_long_ones(words) -> None:
    batches = calibration_batches(words, SOURCE, sequences=3, seqlen=4, batch_size=2, min_chars=5)
    assert [b.tolist() for b in batches] == [[ids(0, 1, 2, 3), ids(20, 21, 22, 23)], [ids(40, 41, 42, 43)]]
    assert all(b.dtype == torch.int64 for b in batches)


def test_documents_must_be_longer_than_min_chars(words) -> None:
    texts = [doc(1, 2, 3), doc(4, 5, 6, 7)]  # 8 and 11 characters
    source = make_source("x", texts)
    batches = calibration_batches(words, source, sequences=1, seqlen=2, batch_size=1, min_chars=8)
    assert batches[0].tolist() == [ids(4, 5)]
    batches = calibration_batches(words, source, sequences=1, seqlen=2, batch_size=1, min_chars=7)
    assert batches[0].tolist() == [ids(1, 2)]


def test_start_token_is_part_of_a_document(words_with_start) -> None:
    batches = calibration_batches(words_with_start, SOURCE, sequences=1, seqlen=4, batch_size=1, min_chars=5)
    assert batches[0].tolist() == [[0, *ids(0, 1, 2)]]


def test_packed_mode_joins_with_the_end_token_and_spreads_the_windows(words) -> None:
    # 10 + 1 + 1 + 1 + 4 + 1 + 3 + 1 + 20 = 42 tokens: 14 windows of 3.
    flat = [*ids(*range(10)), 1, *ids(1), 1, *ids(*range(20, 24)), 1, *ids(*range(30, 33)), 1, *ids(*range(40, 60))]
    everything = calibration_batches(words, SOURCE, sequences=14, seqlen=3, batch_size=14, pack=True)
    assert everything[0].flatten().tolist() == flat
    some = calibration_batches(words, SOURCE, sequences=4, seqlen=3, batch_size=4, pack=True)
    assert some[0].tolist() == [flat[3 * k : 3 * k + 3] for k in (0, 3, 7, 10)]


def test_packed_mode_doubles_no_end_token(words) -> None:
    source = make_source("x", [doc(1) + " </s>", "", doc(2, 3)])
    assert calibration_batches(words, source, sequences=1, seqlen=4, batch_size=1, pack=True)[0].tolist() == [
        [4, 1, 5, 6]
    ]


def test_the_source_decides_the_mode(words) -> None:
    text = doc(*range(90))
    running, listed = make_source("x", [text], running=True), make_source("x", [text])
    assert len(calibration_batches(words, running, sequences=5, seqlen=3, batch_size=9)[0]) == 5
    with pytest.raises(InputError):
        calibration_batches(words, listed, sequences=5, seqlen=3, batch_size=9, min_chars=1)


def test_too_short_says_what_there_is_and_what_is_needed(words) -> None:
    with pytest.raises(InputError) as caught:
        calibration_batches(words, SOURCE, sequences=5, seqlen=12, batch_size=1, min_chars=5)
    message = str(caught.value)
    for part in ("docs", "5 sequences of 12 tokens", "5 documents", "4 are longer than 5", "1 have", "longest has 20"):
        assert part in message
    with pytest.raises(InputError, match=r"5 sequences of 12 tokens need 60 tokens, and it has 42"):
        calibration_batches(words, SOURCE, sequences=5, seqlen=12, batch_size=1, pack=True)


@pytest.mark.parametrize("name", ["sequences", "seqlen", "batch_size"])
def test_counts_below_one_are_refused(words, name: str) -> None:
    counts = {"sequences": 1, "seqlen": 1, "batch_size": 1} | {name: 0}
    with pytest.raises(InputError, match=f"{name} = 0"):
        calibration_batches(words, SOURCE, **counts)


def test_windows_do_not_overlap_and_the_remainder_is_dropped(words) -> None:
    source = make_source("x", [doc(*range(5)), doc(*range(5, 11))])
    windows = evaluation_windows(words, source, windows=None, seqlen=4)
    assert windows.tolist() == [ids(0, 1, 2, 3), ids(4, 5, 6, 7)]
    assert evaluation_windows(words, source, windows=1, seqlen=4).tolist() == [ids(0, 1, 2, 3)]
    assert evaluation_windows(words, source, windows=20, seqlen=4).shape == (2, 4)


def test_windows_are_cut_from_one_text(words_with_start) -> None:
    # The start token comes once, before the whole text: not once a document, not once a window.
    source = make_source("x", [doc(0, 1), doc(2, 3, 4)])
    windows = evaluation_windows(words_with_start, source, windows=None, seqlen=3)
    assert windows.tolist() == [[0, *ids(0, 1)], ids(2, 3, 4)]


def test_text_shorter_than_a_window(words) -> None:
    with pytest.raises(InputError, match="x has 3 tokens and one window needs 4"):
        evaluation_windows(words, make_source("x", [doc(1, 2, 3)]), windows=20, seqlen=4)
    with pytest.raises(InputError, match="windows = 0"):
        evaluation_windows(words, SOURCE, windows=0, seqlen=4)
    with pytest.raises(InputError, match="seqlen = 1"):
        evaluation_windows(words, SOURCE, windows=1, seqlen=1)


def test_token_hash_depends_on_sequences_not_on_batches() -> None:
    tokens = torch.arange(12).view(4, 3)
    same = {token_sha256(tokens), token_sha256([tokens[:1], tokens[1:]]), token_sha256(tokens.to(torch.int32))}
    assert len(same) == 1
    assert token_sha256(tokens.view(3, 4)) not in same
    assert token_sha256(tokens.flip(0)) not in same
    # Pinned: a fingerprint in a journal must mean the same in every version. Made with hashlib and struct alone.
    assert token_sha256(torch.tensor([[1, 2], [3, 4]])) == PINNED


PINNED = "1cbecf025d1c00029ea15f0e5d6ade68509f064ea9572f2593f4eeb7d78cd0e7"

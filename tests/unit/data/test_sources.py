import pytest

from bitfloor.core.errors import InputError
from bitfloor.data import sources
from bitfloor.data.sources import TextSpec, arrange, load_text, make_source, parse_text_spec

WIKI = " \n = Title = \n \n First paragraph . \n Second one . \n"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a/b.txt", TextSpec("text", "a/b.txt")),
        ("a/b.txt:whole", TextSpec("text", "a/b.txt", "whole")),
        ("b.raw:rows", TextSpec("text", "b.raw", "rows")),
        ("b.jsonl", TextSpec("jsonl", "b.jsonl")),
        ("b.JSONL:content", TextSpec("jsonl", "b.JSONL", "content")),
        ("b.parquet:text", TextSpec("parquet", "b.parquet", "text")),
        ("b.parquet:", TextSpec("parquet", "b.parquet")),
        (r"C:\corpus\b.jsonl:body", TextSpec("jsonl", r"C:\corpus\b.jsonl", "body")),
        (r"C:\corpus\b.txt", TextSpec("text", r"C:\corpus\b.txt")),
        (r"C:\corpus", TextSpec("text", r"C:\corpus")),
        ("d.v1:x/b.txt", TextSpec("text", "d.v1:x/b.txt")),
        ("default", TextSpec("default", "")),
        ("hf:wikitext", TextSpec("hub", "wikitext")),
        ("hf:org/set:conf:test:body", TextSpec("hub", "org/set", "body", "conf", "test")),
        ("hf:org/set::test", TextSpec("hub", "org/set", None, None, "test")),
    ],
)
def test_grammar(spec: str, expected: TextSpec) -> None:
    assert parse_text_spec(spec) == expected


@pytest.mark.parametrize("spec", ["", "  ", "hf:", "hf:a:b:c:d:e", "a.txt:text"])
def test_grammar_refuses(spec: str) -> None:
    with pytest.raises(InputError):
        parse_text_spec(spec)


@pytest.mark.parametrize("name", ["notes.txt:whole", "default", "hf:wikitext"])
def test_a_path_that_exists_as_written_wins(tmp_path, monkeypatch, name) -> None:
    (tmp_path / name).write_text("hello\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert parse_text_spec(name) == TextSpec("text", name)
    assert load_text(name, "calibration").documents == ("hello",)


def test_text_file_by_role(tmp_path) -> None:
    file = tmp_path / "wiki.raw"
    file.write_text(WIKI, encoding="utf-8")
    calibration = load_text(str(file), "calibration")
    assert calibration.documents == (" = Title = ", " First paragraph . ", " Second one . ")
    assert not calibration.running
    evaluation = load_text(str(file), "evaluation")
    assert evaluation.documents == (WIKI,)
    assert evaluation.text == WIKI
    assert evaluation.running
    assert calibration.name == evaluation.name == "wiki.raw"


def test_layout_overrides_the_role(tmp_path) -> None:
    file = tmp_path / "wiki.raw"
    file.write_text(WIKI, encoding="utf-8")
    assert load_text(f"{file}:whole", "calibration").documents == (WIKI,)
    lines = load_text(f"{file}:lines", "evaluation")
    assert lines.text == " = Title = \n\n First paragraph . \n\n Second one . "
    assert lines.name == "wiki.raw:lines"


def test_rows_give_the_text_of_a_line_based_data_set() -> None:
    # The hub's rows of this text, written out by hand; joined as GPTQ's scripts join them.
    rows = ["", " = Title = \n", "", " First paragraph . \n", " Second one . \n"]
    assert list(arrange(WIKI, "rows", "wiki")) == rows
    assert make_source("wiki", rows).text == "\n\n".join(rows)
    assert list(arrange(WIKI.removesuffix("\n"), "rows", "wiki")) == rows


def test_carriage_returns_end_no_document_but_stay_in_a_whole_text() -> None:
    assert arrange("a\r\nb\r\n", "lines", "x") == ("a", "b")
    assert arrange("a\r\nb\r\n", "whole", "x") == ("a\r\nb\r\n",)


@pytest.mark.parametrize("layout", sources.LAYOUTS)
def test_white_space_only_is_refused(layout: str) -> None:
    with pytest.raises(InputError, match="white space"):
        arrange(" \n\t\n", layout, "blank.txt")


def test_hash_names_documents_and_their_borders(tmp_path) -> None:
    assert make_source("x", ["ab", "c"]).sha256 == make_source("y", ("ab", "c")).sha256
    others = (["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""])
    assert len({make_source("x", o).sha256 for o in [["ab", "c"], *others]}) == 5
    text, table = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\ntwo\n", encoding="utf-8")
    table.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert load_text(str(text), "calibration").sha256 == load_text(str(table), "calibration").sha256


def test_blank_rows_are_scored_but_not_calibrated_on(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n', encoding="utf-8")
    assert load_text(str(file), "evaluation").text == "one\n\n\n\ntwo"
    assert load_text(str(file), "calibration").documents == ("one", "two")
    file.write_text('{"text": ""}\n{"text": " "}\n', encoding="utf-8")
    with pytest.raises(InputError, match="only empty rows"):
        load_text(str(file), "evaluation")


def test_hub_defaults_follow_the_role(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(sources, "load_hub_rows", lambda *args: asked.append(args) or ["row"])
    assert load_text("hf:org/set", "calibration").name == "hf:org/set:train"
    assert load_text("hf:org/set:conf", "evaluation").name == "hf:org/set:conf:test"
    assert asked == [("org/set", None, "train", "text"), ("org/set", "conf", "test", "text")]


def test_messages_name_the_file_and_no_traceback_is_chained(tmp_path) -> None:
    with pytest.raises(InputError, match="no file .*gone.txt") as caught:
        load_text(str(tmp_path / "gone.txt"), "calibration")
    assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="is a folder"):
        load_text(str(tmp_path), "calibration")

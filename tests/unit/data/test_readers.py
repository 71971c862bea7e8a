import json
import os
import sys
from pathlib import Path

import pytest

from bitfloor.core.errors import InputError
from bitfloor.data.readers import read_jsonl, read_parquet, read_text


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_text_is_read_character_for_character(tmp_path) -> None:
    assert read_text(write(tmp_path / "a", b"a\r\nb\xe2\x80\xa8c\n")) == "a\r\nb\u2028c\n"
    assert read_text(write(tmp_path / "b", b"\xef\xbb\xbfstart")) == "start"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"abc\xff", "0xff at offset 3"),
        (b"abcd\xc3", "0xc3 at offset 4"),
        ("ab".encode("utf-16-le"), "NUL byte at offset 1"),
    ],
)
def test_text_refuses(tmp_path, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_text(write(tmp_path / "a.txt", data))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_text_without_permission(tmp_path) -> None:
    file = write(tmp_path / "a.txt", b"text")
    file.chmod(0)
    with pytest.raises(InputError, match="permissions"):
        read_text(file)


def test_a_read_that_fails_names_the_reason(tmp_path, monkeypatch) -> None:
    file = write(tmp_path / "a.txt", b"text")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError, match="Permission denied"):
        read_text(file)


def test_jsonl(tmp_path) -> None:
    first = json.dumps({"text": "one\u2028still one", "n": 1}, ensure_ascii=False)
    file = write(tmp_path / "a.jsonl", f'{first}\n\n{{"text": "two"}}\n'.encode())
    assert read_jsonl(file, "text") == ["one\u2028still one", "two"]


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        ('{"text": "a"}\n\n{"text": oops}\n', "text", "line 3: not JSON"),
        ('{"text": "a"}\n["b"]\n', "text", "line 2: a list"),
        ('{"body": "a", "id": 1}\n', "text", "line 1 has no field 'text'; fields there: body, id"),
        ('{"text": "a"}\n{"text": 7}\n', "text", "line 2: field 'text' holds a number"),
        ('{"text": null}\n', "text", "holds a null"),
        ("\n\n", "text", "no rows"),
        ("[" * 100_000 + "\n", "text", "line 1: not JSON"),
    ],
)
def test_jsonl_refuses(tmp_path, data: str, field: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_jsonl(write(tmp_path / "a.jsonl", data.encode()), field)


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        read_parquet(write(tmp_path / "a.parquet", b"PAR1"), "text")


def test_parquet(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2], "maybe": ["x", None]}), file)
    assert read_parquet(file, "text") == ["one", "two"]
    with pytest.raises(InputError, match="fields there: maybe, n, text"):
        read_parquet(file, "body")
    with pytest.raises(InputError, match="row 0: field 'n' holds a number"):
        read_parquet(file, "n")
    with pytest.raises(InputError, match="row 1: field 'maybe' holds a null"):
        read_parquet(file, "maybe")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_parquet(write(tmp_path / "b.parquet", b"not parquet at all"), "text")
    with pytest.raises(InputError, match="no file"):
        read_parquet(tmp_path / "gone.parquet", "text")

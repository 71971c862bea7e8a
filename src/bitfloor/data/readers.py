"""Reading text out of files. Each function returns rows or raises one sentence; none guesses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitfloor.core.errors import InputError


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, newlines untouched, a leading byte order mark removed.

    Raises:
        InputError: missing, a folder, not readable, empty, not UTF-8 (the byte offset is named), or holding NUL bytes.
    """
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; convert it first "
            "(for example with iconv -t UTF-8)."
        ) from None
    nul = data.find(b"\0")
    if nul >= 0:
        raise InputError(f"{path} holds a NUL byte at offset {nul}, so it is no UTF-8 text; convert it first.")
    return text.removeprefix("\ufeff")


def read_jsonl(path: Path, field: str) -> list[str]:
    """One field of a JSON-lines file, in file order. Blank lines are skipped.

    Raises:
        InputError: as ``read_text``; bad JSON, a line that is no object, an unknown field, a value that is no string.
    """
    rows: list[str] = []
    # Only "\n" ends a line of JSON lines: str.splitlines would cut at U+2028, which may stand inside a string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise InputError(f"{path}, line {number}: not JSON ({reason}); each line must be one object.") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: a {_type_name(record)}, not an object with fields.")
        rows.append(_text_of(record, field, f"{path}, line {number}"))
    if not rows:
        raise InputError(f"{path} holds no rows; give a file with text in it.")
    return rows


def read_parquet(path: Path, field: str) -> list[str]:
    """One column of a parquet file, in file order.

    Raises:
        InputError: pyarrow is not installed, the file cannot be read as parquet, an unknown column, no rows, or a value
            that is no string.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"Reading {path} needs pyarrow; install it with: pip install pyarrow") from None
    _check_readable(path)
    try:
        with ParquetFile(path) as table:
            check_field(table.schema_arrow.names, field, str(path))
            values = table.read(columns=[field]).column(field).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
    return text_rows(values, field, str(path))


def text_rows(values: Iterable[Any], field: str, where: str) -> list[str]:
    """Check that a column is text.

    Raises:
        InputError: a value that is no string (its row is named), or no rows at all.
    """
    rows: list[str] = []
    for number, value in enumerate(values):
        rows.append(_text_of({field: value}, field, f"{where}, row {number}"))
    if not rows:
        raise InputError(f"{where} holds no rows; give one with text in it.")
    return rows


def check_field(names: Iterable[str], field: str, where: str) -> None:
    """Refuse a field that is not there, naming those that are."""
    names = list(names)
    if field not in names:
        there = ", ".join(sorted(names)) or "none"
        raise InputError(f"{where} has no field {field!r}; fields there: {there}. Name one after a colon.")


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    check_field(record, field, where)
    value = record[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {field!r} holds a {_type_name(value)}, not text; choose a field of strings.")
    return value


def _type_name(value: object) -> str:
    names = {dict: "object", list: "list", bool: "true/false value", int: "number", float: "number", str: "string"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a text file in it.")
    if not path.exists():
        raise InputError(f"There is no file {path}; give an existing file, hf:NAME, or default.")


def _read_bytes(path: Path) -> bytes:
    _check_readable(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; check its permissions.") from None
    if not data:
        raise InputError(f"{path} is empty; give a file with text in it.")
    return data

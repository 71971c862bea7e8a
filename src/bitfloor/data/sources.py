"""Where text comes from: one short spec in, documents and a content hash out.

The grammar, for ``--calib`` and ``--perplexity`` alike::

    file.txt[:lines|:whole|:rows]     any other suffix is read as plain text too
    file.jsonl[:field]                also .ndjson
    file.parquet[:field]              needs the optional extra "parquet"
    hf:NAME[:config][:split][:field]  needs the optional extra "hub" and a network; empty parts take their defaults
    default                           the offline default text (see docs/default-text.md)

A path that exists as written wins over any reading of the colons in it. docs/evaluation.md says which layout of a
plain text file gives the numbers the field quotes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitfloor.core.errors import InputError
from bitfloor.data.hub import load_hub_rows
from bitfloor.data.offline import default_documents, python_series
from bitfloor.data.readers import read_jsonl, read_parquet, read_text

Role = Literal["calibration", "evaluation"]

SEPARATOR = "\n\n"
"""What stands between two documents when they are scored as one text: the field's ``"\\n\\n".join(rows)``."""

LAYOUTS = ("lines", "whole", "rows")
DEFAULT_LAYOUT: dict[Role, str] = {"calibration": "lines", "evaluation": "whole"}
DEFAULT_SPLIT: dict[Role, str] = {"calibration": "train", "evaluation": "test"}
DEFAULT_FIELD = "text"
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class TextSpec:
    """A parsed spec. ``option`` is the layout of a plain text file, or the field of a table; None means the default.

    Args:
        kind: ``"text"``, ``"jsonl"``, ``"parquet"``, ``"hub"`` or ``"default"``.
        target: the path, the hub name, or ``""``.
        config: hub configuration.
        split: hub split.
    """

    kind: str
    target: str
    option: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class TextSource:
    """Text that was read, ready to be tokenised.

    Args:
        name: short name without directories, for reports: ``"wiki.test.raw"``, ``"hf:NAME:test"``.
        documents: at least one; none is empty unless the layout is ``rows``.
        sha256: hash over the documents, their borders and the separator; equal for the same text in another container.
        separator: joins the documents into one text for scoring.
        running: one long text (or a shuffled corpus) that calibration should cut into windows, rather than a list of
            documents of which each gives one sequence.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    separator: str = SEPARATOR
    running: bool = False

    @property
    def text(self) -> str:
        """The documents as one text."""
        return self.separator.join(self.documents)


def parse_text_spec(spec: str) -> TextSpec:
    """Read the grammar in the module docstring.

    Raises:
        InputError: an empty spec, an unknown layout, or a hub spec without a name or with too many parts.
    """
    if not spec.strip():
        raise InputError("The text spec is empty; give a file, hf:NAME, or default.")
    if Path(spec).exists():
        return TextSpec(_kind_of(spec), spec)
    if spec == "default":
        return TextSpec("default", "")
    if spec.startswith("hf:"):
        return _parse_hub(spec)
    path, colon, option = spec.rpartition(":")
    # "C:\\corpus" has no option: what follows a colon is one only when a file name stands before it.
    if colon and Path(path).suffix and not set("/\\") & set(option):
        kind = _kind_of(path)
        if kind == "text" and option and option not in LAYOUTS:
            raise InputError(
                f"{spec!r}: {option!r} is no layout of a plain text file; use one of {', '.join(LAYOUTS)} "
                "(fields exist only in .jsonl and .parquet files)."
            )
        return TextSpec(kind, path, option or None)
    return TextSpec(_kind_of(spec), spec)


def load_text(spec: str, role: Role) -> TextSource:
    """Read the text a spec names.

    Args:
        spec: see the module docstring.
        role: decides what the spec leaves open. Calibration takes one document a line and the ``train`` split;
            evaluation takes the text as it stands and the ``test`` split. The default text has two disjoint parts.

    Raises:
        InputError: whatever is wrong with the spec, the file or its content, in one sentence.
    """
    parsed = parse_text_spec(spec)
    if parsed.kind == "default":
        documents = default_documents(role)
        return make_source(f"default ({python_series()}, {role})", documents, running=True)
    if parsed.kind == "hub":
        split = parsed.split or DEFAULT_SPLIT[role]
        field = parsed.option or DEFAULT_FIELD
        rows = load_hub_rows(parsed.target, parsed.config, split, field)
        name = ":".join(["hf", parsed.target, *([parsed.config] if parsed.config else []), split])
        return make_source(name, _checked(rows, role, name))
    path = Path(parsed.target)
    if parsed.kind == "text":
        layout = parsed.option or DEFAULT_LAYOUT[role]
        name = path.name if parsed.option is None else f"{path.name}:{layout}"
        return make_source(name, arrange(read_text(path), layout, path.name), running=layout != "lines")
    field = parsed.option or DEFAULT_FIELD
    rows = read_jsonl(path, field) if parsed.kind == "jsonl" else read_parquet(path, field)
    return make_source(path.name, _checked(rows, role, path.name))


def make_source(name: str, documents: Sequence[str], *, running: bool = False) -> TextSource:
    """A ``TextSource`` with its hash: for text that was not read from a spec, such as a list in a Python program."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    digest.update(SEPARATOR.encode())
    return TextSource(name, tuple(documents), digest.hexdigest(), running=running)


def arrange(text: str, layout: str, name: str) -> tuple[str, ...]:
    """Cut a plain text file into documents.

    Args:
        text: the file's content, not empty.
        layout: ``"lines"``: every line that is not blank is a document. ``"whole"``: the file is one document,
            character for character. ``"rows"``: every line is a row of a line-based data set as the hub serves it (the
            line with its newline, or the empty string for a blank line), so that joining them gives the text that
            GPTQ's scripts score.
        name: for the message.

    Raises:
        InputError: nothing but blank lines.
    """
    if not text.strip():
        raise InputError(f"{name} holds only white space; give a file with text in it.")
    if layout == "whole":
        return (text,)
    lines = text.split("\n")
    if layout == "rows":
        rows = lines[:-1] if lines[-1] == "" else lines
        return tuple(line + "\n" if line.strip() else "" for line in rows)
    return tuple(line.removesuffix("\r") for line in lines if line.strip())


def _kind_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in JSON_LINES:
        return "jsonl"
    return "parquet" if suffix == ".parquet" else "text"


def _parse_hub(spec: str) -> TextSpec:
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 3:
        raise InputError(f"{spec!r} is not a hub text; write hf:NAME[:config][:split][:field].")
    config, split, field = [part or None for part in rest] + [None] * (3 - len(rest))
    return TextSpec("hub", name, field, config, split)


def _checked(rows: Sequence[str], role: Role, name: str) -> Sequence[str]:
    """Blank rows are part of a text that is scored (its paragraph breaks), and no documents to calibrate on."""
    if not any(row.strip() for row in rows):
        raise InputError(f"{name} holds only empty rows; give one with text in it.")
    return rows if role == "evaluation" else [row for row in rows if row.strip()]

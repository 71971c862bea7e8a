"""The offline default text: English prose that every full Python installation already holds.

Two sources, both part of the standard library and so present wherever bitfloor runs: the language reference as pydoc
ships it (``pydoc_data.topics``), and the longer docstrings of the standard library's modules, parsed and never
imported. docs/default-text.md gives the reasons and the measurements. The text differs between Python versions; its
hash is part of whatever is computed from it.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from bitfloor.core.errors import InputError

EVALUATION_SHARE = 0.16
"""Share of the titles held out: leaves over 128 x 2,048 tokens to calibrate on and over 20 x 2,048 to score."""

MIN_DOCSTRING = 200
"""Characters: shorter docstrings are fragments ("Return the name."), longer ones are prose."""

MIN_DOCUMENT = 400
"""Characters left of a document after repeated paragraphs are gone."""

MIN_REPEAT = 40
"""Characters from which on an equal paragraph counts as repeated; "For example:" may come twice."""

# Packages that distributors split off, patch or leave out, and generated tables: the text must not depend on these.
LEFT_OUT = frozenset(
    {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtle"}
    | {"turtledemo", "venv", "this", "antigravity", "site", "sysconfig"}
)

_NOT_PROSE = re.compile(r"\s|>>>|\.\.\.|[-*+|#=~^]|\d+[.)]\s|:")


def python_series() -> str:
    """The Python whose text is used, as in ``"python 3.11.7"``."""
    return "python " + ".".join(str(part) for part in sys.version_info[:3])


def default_documents(role: str) -> tuple[str, ...]:
    """One part of the default text.

    Args:
        role: ``"calibration"`` or ``"evaluation"``. No title and no paragraph of 40 characters or more is in both.

    Returns:
        The documents in an order given by the hash of their titles, so that any stretch of them is a mixture.

    Raises:
        InputError: this Python installation holds no library source to take the text from.
    """
    held_out = role == "evaluation"
    return tuple(text for title, text in _corpus() if is_held_out(title) == held_out)


def is_held_out(title: str) -> bool:
    """Whether a title belongs to the evaluation part. A package's modules stay together, as their wording is alike."""
    group = "/".join(title.split("/")[:2])
    return _hash(f"part {group}") < EVALUATION_SHARE * 2**64


@lru_cache(maxsize=1)
def _corpus() -> tuple[tuple[str, str], ...]:
    """Every document as (title, text), without repeated paragraphs.

    The reference's long topics contain its short ones, so short topics go first and keep their paragraphs.
    """
    seen: set[str] = set()
    documents = []
    topics = sorted(_topics(), key=lambda item: (len(item[1]), item[0]))
    for title, text in [*topics, *sorted(_module_docstrings())]:
        kept = "\n\n".join(_new_paragraphs(text, seen))
        if len(kept) >= MIN_DOCUMENT:
            documents.append((title, kept))
    return tuple(sorted(documents, key=lambda item: _hash(f"order {item[0]}")))


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _no_text("pydoc_data") from None
    for name, text in topics.items():
        yield f"reference/{name}", text


def _module_docstrings() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(sys.stdlib_module_names - LEFT_OUT)
    found = False
    for name in names:
        package = library / name
        files = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{name}.py"]
        for file in files:
            parts = file.relative_to(library).parts
            if file.is_file() and not LEFT_OUT & set(parts):
                found = True
                yield "library/" + "/".join(parts), "\n\n".join(_docstrings(file))
    if not found:
        raise _no_text("the standard library's source files")


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the library's own escapes are not our business
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{file}, part of the default text, cannot be read ({error}); give a text file.") from None
    yield from _docstrings_below(tree)


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    """In source order. Only statements are visited: expressions hold no docstrings and are most of the tree."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_DOCSTRING:
            yield text
    for part in ("body", "orelse"):
        statements = getattr(node, part, ())
        for statement in statements if isinstance(statements, list) else ():
            yield from _docstrings_below(statement)


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """Paragraphs not met before. Prose is unwrapped to one line a paragraph, as in the web text models are trained on;
    code, lists and tables stay as they are."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = [line.rstrip() for line in block.split("\n") if not re.fullmatch(r"\s*([=*~^-])\1{2,}\s*", line)]
        if not any(lines):
            continue
        prose = not any(_NOT_PROSE.match(line) for line in lines)
        paragraph = " ".join(lines) if prose else "\n".join(lines)
        key = " ".join(paragraph.split())
        if len(key) >= MIN_REPEAT and key in seen:
            continue
        seen.add(key)
        yield paragraph


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _no_text(what: str) -> InputError:
    return InputError(
        f"The default text is made from {what}, which this Python installation ({sys.prefix}) does not hold; "
        "give a text file instead."
    )

"""Finished parts on disk: whole, checked, and of this run only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitfloor.core.errors import InputError
from bitfloor.pipeline.journal import FOLDER, Entry, Journal, differences, part_name

FINGERPRINT = {"recipe": "abc", "threads": 2, "calibration_tokens": "none"}


def entry(value: float = 1.0) -> Entry:
    return Entry({"w": torch.full((3, 5), value), "b.codes": torch.arange(64, dtype=torch.uint8)}, {"block_error": 0.5})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path, FINGERPRINT)
    made.begin(True)
    return made


def test_what_is_put_comes_back(journal: Journal) -> None:
    part = part_name(12)
    assert part == "block-00012" and journal.facts(part) is None
    journal.put(part, entry())
    found = journal.get(part)
    assert found.facts == journal.facts(part) == {"block_error": 0.5}
    assert set(found.tensors) == {"w", "b.codes"}
    assert all(torch.equal(found.tensors[name], entry().tensors[name]) for name in found.tensors)
    first = journal.path(part).read_bytes()
    journal.put(part, entry())
    assert journal.path(part).read_bytes() == first


@pytest.mark.parametrize("at", [3, 40, -1], ids=["header length", "header", "data"])
def test_a_changed_byte_removes_the_part(at: int, journal: Journal) -> None:
    journal.put("ends", entry())
    data = bytearray(journal.path("ends").read_bytes())
    data[at] ^= 4
    journal.path("ends").write_bytes(data)
    assert journal.facts("ends") is None and not journal.path("ends").exists()


def test_a_second_attempt_continues(journal: Journal, tmp_path: Path) -> None:
    journal.put("ends", entry())
    again = Journal(tmp_path, FINGERPRINT)
    again.begin(True)
    assert again.facts("ends") == {"block_error": 0.5}
    again.begin(False)
    assert again.facts("ends") is None and (tmp_path / FOLDER / "run.json").is_file()


def test_another_run_is_refused_and_nothing_is_touched(journal: Journal, tmp_path: Path) -> None:
    journal.put("ends", entry())
    other = Journal(tmp_path, {**FINGERPRINT, "threads": 8, "calibration_tokens": "ff"})
    with pytest.raises(InputError) as caught:
        other.begin(True)
    assert "calibration tokens was none and is now ff; threads was 2 and is now 8" in str(caught.value)
    assert "recipe" not in str(caught.value) and journal.facts("ends") is not None
    other.begin(False)
    assert other.facts("ends") is None


def test_parts_without_a_run_are_of_nobody(journal: Journal, tmp_path: Path) -> None:
    journal.put("ends", entry())
    (tmp_path / FOLDER / "run.json").unlink()
    journal.begin(True)
    assert journal.facts("ends") is None


def test_closing_removes_everything(journal: Journal, tmp_path: Path) -> None:
    journal.put("ends", entry())
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_differences() -> None:
    assert differences({"a": 1, "b": 2}, {"b": 2, "a": 1}) == ""
    assert differences({"a": 1}, {"a": 2}) == "a was 1 and is now 2"
    # A field that an older version did not record counts as another value.
    assert differences({"a_b": 1}, {"c": 2}) == "a b was 1 and is now None; c was None and is now 2"

"""Times are remembered apart from the checkpoint, and losing them loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitfloor.pipeline.timing import recall, remember


def test_times_come_back_for_the_same_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLOOR_CACHE", str(tmp_path / "cache"))
    assert recall({"recipe": "a"}) == {}
    remember({"recipe": "a", "threads": 2}, {"q": 1.5})
    assert recall({"threads": 2, "recipe": "a"}) == {"q": 1.5} and recall({"recipe": "b"}) == {}


def test_a_cache_that_cannot_be_written_or_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BITFLOOR_CACHE", str(tmp_path / "file"))
    remember({"recipe": "a"}, {"q": 1.5})
    assert recall({"recipe": "a"}) == {}
    monkeypatch.setenv("BITFLOOR_CACHE", str(tmp_path))
    remember({"recipe": "a"}, {"q": 1.5})
    (path,) = (tmp_path / "runs").iterdir()
    for damaged in ("", "[]", '{"seconds": 3}', '{"seconds": {"q": "soon"}}'):
        path.write_text(damaged)
        assert recall({"recipe": "a"}) == {}

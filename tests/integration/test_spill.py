"""Activations on disk: a folder for each run, and nothing left in it however the run ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.pipeline.events import Event

Recipe = dict[str, Any]


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def model(pico: Callable[..., Path]) -> Path:
    return pico("llama")


def test_runs_may_share_a_spill_folder(model: Path, small: Recipe, tmp_path: Path) -> None:
    spill, other = tmp_path / "spill", tmp_path / "other"

    def meddle(event: Event) -> None:  # in the middle of the first run, a second one comes and goes
        if event.kind == "block" and event.block == 1:
            api.quantize(model, other, small, spill=spill)

    api.quantize(model, tmp_path / "alone", small)
    api.quantize(model, tmp_path / "out", small, spill=spill, progress=meddle)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "alone", tmp_path / "out", other)]
    assert weights[0] == weights[1] == weights[2]
    assert not list(spill.iterdir())


def test_what_a_killed_run_spilled_is_removed(model: Path, small: Recipe, tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    found: list[Path] = []

    def look(event: Event) -> None:
        found.extend(spill.iterdir())
        raise Stopped

    with pytest.raises(Stopped):
        api.quantize(model, tmp_path / "out", small, spill=spill, progress=look)
    left = found[0] / "float" / "000000.123.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a batch")
    api.quantize(model, tmp_path / "out", small, spill=spill)
    assert not list(spill.iterdir())


def test_a_spill_folder_that_cannot_be_made_is_wrong_input(model: Path, small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the spill folder"):
        api.quantize(model, tmp_path / "out", small, spill=tmp_path / "file")
    assert not list((tmp_path / "out").iterdir())

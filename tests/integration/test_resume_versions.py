"""Runs that were interrupted under an older format version, and folders that one finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from integration.test_resume import Stopped, contents, stop_at

from bitfloor import api
from bitfloor.pipeline.journal import FOLDER


def test_a_journal_knows_no_format_version_so_runs_of_version_0_are_continued(
    pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    """What a run leaves behind when it stops is the same under versions 0 and 1."""
    model, out = pico("llama"), tmp_path / "out"
    api.quantize(model, tmp_path / "whole", small)
    with pytest.raises(Stopped):
        api.quantize(model, out, small, progress=stop_at(1, Stopped()))
    for path in (out / FOLDER).iterdir():
        assert b"format_version" not in path.read_bytes() and b"shard_sha256" not in path.read_bytes()
    api.quantize(model, out, small)
    assert contents(out) == contents(tmp_path / "whole")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = 0
    (out / "config.json").write_text(json.dumps(config))
    api.quantize(model, out, small)  # finished: kept as it is
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format_version"] == 0

"""The output folder: ours, empty, or none of our business."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from bitfloor.core.errors import InputError
from bitfloor.pipeline.folder import (
    clear_finished,
    copy_companions,
    damaged_file,
    finished_report,
    model_config,
    only_writer,
    prepare,
)


def finish(out: Path) -> None:
    for name in ("config.json", "bitfloor.json", "model-00001-of-00002.safetensors", "tokenizer.json", "LICENSE"):
        (out / name).write_text("{}")


def test_new_empty_and_nested_folders(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "a" / "b"):
        assert prepare(out, resume=True) is None and out.is_dir()
        assert [path.name for path in out.iterdir()] == []


def test_a_finished_checkpoint_is_returned_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "bitfloor.json").write_text('{"made_from": {"threads": 1}}')
    assert prepare(tmp_path, resume=True) == {"made_from": {"threads": 1}}
    assert prepare(tmp_path, resume=False) is None and finished_report(tmp_path) is not None


@pytest.mark.parametrize("missing", ["config.json", "bitfloor.json"])
def test_half_a_checkpoint_is_not_finished(missing: str, tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / missing).unlink()
    assert finished_report(tmp_path) is None
    with pytest.raises(InputError, match="is not a bitfloor run"):
        prepare(tmp_path, resume=True)
    (tmp_path / ".bitfloor").mkdir()  # with its journal it is
    assert prepare(tmp_path, resume=True) is None


@pytest.mark.parametrize("resume", [True, False])
def test_what_is_not_ours_is_refused_and_left_alone(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds 'config.json'"):
        prepare(tmp_path, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes"]
    with pytest.raises(InputError, match="is a file"):
        prepare(tmp_path / "notes", resume=resume)


def test_clearing_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    finish(tmp_path)
    report = {"made_from": {}, "files": {"model-00001-of-00002.safetensors": "0"}, "companions": ["tokenizer.json"]}
    (tmp_path / "bitfloor.json").write_text(json.dumps(report))
    (tmp_path / "tokenizer_mine.txt").write_text("mine")
    (tmp_path / ".bitfloor").mkdir()
    clear_finished(tmp_path)
    # The licence lay there before: this run did not copy one.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bitfloor", "LICENSE", "tokenizer_mine.txt"]
    clear_finished(tmp_path)
    assert (tmp_path / "LICENSE").exists()


def test_a_hidden_folder_of_something_else_makes_nothing_ours(tmp_path: Path) -> None:
    (tmp_path / ".bitfloor").mkdir()
    assert prepare(tmp_path, resume=True) is None  # a run that was killed before it wrote anything
    (tmp_path / ".bitfloor" / "settings.toml").write_text("")
    with pytest.raises(InputError, match="is not a bitfloor run"):
        prepare(tmp_path, resume=True)


def test_companions_are_copied_and_weights_and_code_are_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    wanted = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt", "LICENSE.txt")
    others = ("model.safetensors", "config.json", "modeling_own.py", "pytorch_model.bin", "README.md")
    for name in (*wanted, *others):
        (source / name).write_text(name)
    assert sorted(copy_companions(source, out)) == sorted(wanted)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: name for name in wanted}


def test_the_configuration_keeps_everything_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "own": [1]}))
    assert model_config(tmp_path, {"bits": 3}) == {
        "model_type": "llama",
        "own": [1],
        "quantization_config": {"bits": 3},
    }


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with only_writer(tmp_path):
        with pytest.raises(InputError, match="another run is writing to"), only_writer(tmp_path):
            pass
        (tmp_path / "other").mkdir()
        with only_writer(tmp_path / "other"):
            pass
    with pytest.raises(KeyError), only_writer(tmp_path):
        raise KeyError
    with only_writer(tmp_path):  # given back, after an exception too
        pass


def test_a_shard_that_changed_or_vanished_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"as written")
    report = {"files": {shard.name: hashlib.sha256(b"as written").hexdigest()}}
    assert damaged_file(tmp_path, report) is None
    shard.write_bytes(b"as writteN")
    assert damaged_file(tmp_path, report) == shard.name
    shard.unlink()
    assert damaged_file(tmp_path, report) == shard.name
    assert damaged_file(tmp_path, {}) is None  # a report from before this was recorded

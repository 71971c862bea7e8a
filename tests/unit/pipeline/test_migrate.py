"""From format version 0 to 1 on disk: the same bytes as if version 1 had been written, and nothing lost when killed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import random_segment

from bitfloor.core.errors import InputError
from bitfloor.core.headers import build_header, read_header
from bitfloor.core.packed import PackedWeight
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.formats.layout import build_config
from bitfloor.formats.native import encode, layout
from bitfloor.formats.shards import CheckpointWriter
from bitfloor.formats.verify import verify_checkpoint
from bitfloor.pipeline import migrate
from bitfloor.pipeline.migrate import migrate_checkpoint


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A checkpoint of version 1 in two shards, with a report, a tokenizer and a folder of something else."""
    generator = torch.Generator().manual_seed(0)
    writer = CheckpointWriter(tmp_path / "v1", 2200)
    layouts = {}
    for name in ("a", "b"):
        weight = PackedWeight((18, 40), (random_segment(generator, 18, 40, 3),))
        layouts[name] = layout(weight)
        for tensor_name, tensor in encode(name, weight).items():
            writer.add_tensor(tensor_name, tensor)
    writer.add_tensor("norm.weight", torch.ones(7))
    files = writer.write()
    assert len(files) == 2
    folder = tmp_path / "v1"
    _store(folder / "bitfloor.json", {"files": files, "made_from": {}, "bytes": 3})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("mine")
    writer.finish({"model_type": "x", "quantization_config": build_config(layouts, kept=["norm.weight"]).to_dict()})
    return folder


@pytest.fixture
def older(newer: Path, tmp_path: Path) -> Path:
    """The same as version 0 wrote it: no checksum in the shards, and so other hashes in the report."""
    folder = tmp_path / "v0"
    folder.mkdir()
    for path in newer.iterdir():
        if path.suffix == ".safetensors":
            data = path.read_bytes()
            entries = read_header(path).tensors
            header = build_header({n: (e.dtype, e.shape) for n, e in entries.items()}, {"format": "pt"})
            (folder / path.name).write_bytes(header + data[8 + int.from_bytes(data[:8], "little") :])
        elif path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("mine")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    _store(folder / "bitfloor.json", {**json.loads((newer / "bitfloor.json").read_text()), "files": files})
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 0
    _store(folder / "config.json", config)
    return folder


def _store(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_migrated_folder_is_what_version_1_would_have_written(older: Path, newer: Path, tmp_path: Path) -> None:
    before = _bytes(older)
    assert before != _bytes(newer)
    done = migrate_checkpoint(older, tmp_path / "out")
    assert (done["from"], done["to"]) == (0, 1)
    assert _bytes(tmp_path / "out") == _bytes(newer)
    assert _bytes(older) == before
    migrate_checkpoint(older, None)
    assert _bytes(older) == _bytes(newer)


class Killed(BaseException):
    """Nothing after it runs."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Stop at the beginning of the step-th write of a file; the number of writes there were."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*given: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return real(*given)

        return stopping

    for name in ("rewrite_shard", "write_json", "atomic_file"):
        monkeypatch.setattr(migrate, name, counted(getattr(migrate, name)))
    return lambda: count


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "new folder"])
def test_killed_anywhere_nothing_is_lost(
    in_place: bool, older: Path, newer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = None if in_place else tmp_path / "out"
    with monkeypatch.context() as patch:
        writes = _kill_at(patch, 0)
        migrate_checkpoint(older, tmp_path / "whole")
    tensors = _tensors(newer)
    for step in range(1, writes() + 1):
        with monkeypatch.context() as patch:
            _kill_at(patch, step)
            try:
                migrate_checkpoint(older, out)
            except Killed:
                assert _tensors(older) == tensors  # a whole checkpoint, of one version or the other
                assert read_checkpoint(older).native.version == 0
                assert out is None or not (out / "config.json").exists()
            else:
                assert in_place and _bytes(older) == _bytes(newer)
                return  # fewer files are written in place
    migrate_checkpoint(older, out)  # continues in the folder that a killed one left
    assert _bytes(out or older) == _bytes(newer)


def _tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for name, (path, entry) in read_checkpoint(folder).tensors.items():
        found[name] = path.read_bytes()[entry.start : entry.stop]
    return found


def test_in_place_a_shard_that_was_done_is_not_done_again(
    older: Path, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _kill_at(patch, 2)
        with pytest.raises(Killed):
            migrate_checkpoint(older, None)
    report = json.loads((older / "bitfloor.json").read_text())
    verify_checkpoint(read_checkpoint(older), report["files"])  # half migrated it is a whole checkpoint still
    with monkeypatch.context() as patch:
        writes = _kill_at(patch, 0)
        migrate_checkpoint(older, None)
    assert writes() == 3  # the other shard, report, config.json
    assert _bytes(older) == _bytes(newer)


def test_what_cannot_be_migrated_gets_a_sentence(older: Path, newer: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of format version 1 already"):
        migrate_checkpoint(newer, tmp_path / "out")
    with pytest.raises(InputError, match="is the checkpoint itself; add --in-place"):
        migrate_checkpoint(older, older)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="it holds 'thesis.tex'"):
        migrate_checkpoint(older, tmp_path / "full")
    with pytest.raises(InputError, match=r"it holds 'config.json'"):
        migrate_checkpoint(older, newer)
    with pytest.raises(InputError, match="is a file"):
        migrate_checkpoint(older, tmp_path / "full" / "thesis.tex")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("mine")  # a name that the checkpoint has too
    with pytest.raises(InputError, match=r"it holds 'model.safetensors'"):
        migrate_checkpoint(older, tmp_path / "mine")
    assert (tmp_path / "mine" / "model.safetensors").read_text() == "mine"
    with pytest.raises(InputError, match="lies inside the checkpoint"):
        migrate_checkpoint(older, older / "new")
    with pytest.raises(InputError, match="cannot be written"):
        migrate_checkpoint(older, tmp_path / ("x" * 300))
    config = json.loads((older / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    _store(older / "config.json", config)
    with pytest.raises(InputError, match="format_version 2 and this bitfloor reads versions 0 to 1"):
        migrate_checkpoint(older, None)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "new folder"])
def test_damage_is_not_given_a_new_checksum(in_place: bool, older: Path, tmp_path: Path) -> None:
    """Version 0 has no checksum in its shards, but a report beside them."""
    shard = sorted(older.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        migrate_checkpoint(older, None if in_place else tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists() and read_checkpoint(older).native.version == 0


def test_without_a_report_there_is_nothing_to_compare_with(older: Path, tmp_path: Path) -> None:
    (older / "bitfloor.json").unlink()
    migrate_checkpoint(older, tmp_path / "out")
    assert not (tmp_path / "out" / "bitfloor.json").exists()
    assert verify_checkpoint(read_checkpoint(tmp_path / "out")).without == ()

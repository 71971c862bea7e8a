"""A run may stop anywhere. The same command then gives the same bytes, and another is told what is in the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitfloor import api
from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.formats import atomic
from bitfloor.pipeline import finish, quantize
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.journal import FOLDER, Journal
from bitfloor.pipeline.run import Run

Recipe = dict[str, Any]
PARTS = ["ends", "block-00000", "block-00001", "block-00002"]


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a finished folder, hidden ones and leftovers included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def model(pico: Callable[..., Path]) -> Path:
    return pico("llama")


@pytest.fixture
def expected(model: Path, small: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run writes."""
    if not _EXPECTED:
        whole = tmp_path_factory.mktemp("whole") / "out"
        api.quantize(model, whole, small)
        _EXPECTED.update(contents(whole))
    return _EXPECTED


_EXPECTED: dict[str, str] = {}


def stop_at(block: int, error: BaseException) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if event.kind == "block" and event.block == block:
            raise error

    return watch


def begin(model: Path, out: Path, small: Recipe, block: int = 1) -> None:
    """Run up to and including one block."""
    with pytest.raises(Stopped):
        api.quantize(model, out, small, progress=stop_at(block, Stopped()))
    assert not (out / "config.json").exists()


# -- stopped anywhere ----------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes(model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path) -> None:
    assert {"config.json", "bitfloor.json", "model.safetensors", "tokenizer.json"} <= set(expected)
    report = api.quantize(model, tmp_path / "elsewhere", small, spill=tmp_path / "spill")
    assert contents(tmp_path / "elsewhere") == expected
    assert str(tmp_path) not in json.dumps(report)
    assert not list((tmp_path / "spill").iterdir())  # the activations are gone when the run is


@pytest.mark.parametrize(("block", "error"), [(0, Stopped()), (1, KeyboardInterrupt()), (2, Stopped())])
def test_stopped_after_a_block(
    block: int, error: BaseException, model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(type(error)):
        api.quantize(model, out, small, progress=stop_at(block, error), spill=tmp_path / "spill")
    assert not list((tmp_path / "spill").iterdir())  # also when it fails
    events: list[Event] = []
    api.quantize(model, out, small, progress=events.append)
    assert [e.block for e in events if e.kind == "block"] == list(range(block + 1, 3))
    assert contents(out) == expected


def fail_on(patch: pytest.MonkeyPatch, owner: Any, name: str, count: int, error: BaseException) -> None:
    """Let the ``count``-th call of a function fail before it does anything."""
    original = getattr(owner, name)
    left = [count]

    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, name, failing)


STEPS: dict[str, tuple[Any, str, int]] = {
    "journal": (Journal, "begin", 1),
    "embedding and head": (Journal, "put", 1),
    "first block": (Journal, "put", 2),
    "last block": (Journal, "put", 4),
    "streams": (Run, "_prepare_streams", 1),
    "shards": (finish.CheckpointWriter, "write", 1),
    "companions": (finish, "copy_companions", 1),
    "report": (finish, "write_json", 1),
    "config": (finish.CheckpointWriter, "finish", 1),
    "timings": (finish, "remember", 1),
    "clean-up": (Journal, "close", 1),
}


@pytest.mark.parametrize("step", STEPS)
def test_stopped_at_a_step(
    step: str, model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_on(patch, *STEPS[step], Stopped(step))
        with pytest.raises(Stopped, match=step):
            api.quantize(model, tmp_path / "out", small)
    assert (tmp_path / "out" / "config.json").exists() == (step in ("timings", "clean-up"))
    api.quantize(model, tmp_path / "out", small)
    assert contents(tmp_path / "out") == expected


KILLED = """
import os, signal, sys, warnings
import torch
from bitfloor import api
from bitfloor.modeling.loader import open_source

model, out, recipe, attempts = sys.argv[1], sys.argv[2], eval(sys.argv[3]), 0
open_source(model)  # imports what would otherwise be imported in every attempt
assert torch.get_num_threads() == 1
while True:
    attempts += 1
    child = os.fork()
    if child == 0:
        left = attempts
        sync, replace = os.fsync, os.replace

        def step(tear=None):
            global left
            left -= 1
            if left == 0:
                if tear is not None:
                    os.ftruncate(tear, os.fstat(tear).st_size // 2)  # half of the file had been written
                os.kill(os.getpid(), signal.SIGKILL)

        def torn_sync(descriptor):
            if not os.path.isdir(f"/proc/self/fd/{descriptor}"):
                step(descriptor)
            sync(descriptor)

        def cut_replace(source, target):
            step()  # whole, but under its temporary name
            replace(source, target)

        os.fsync, os.replace = torn_sync, cut_replace
        try:
            api.quantize(model, out, recipe)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        print(attempts, os.WEXITSTATUS(status))
        break
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc to tell files from folders")
def test_killed_over_and_over_inside_its_writes(model: Path, small: Recipe, tmp_path: Path) -> None:
    """Attempt ``n`` is killed at its ``n``-th write, before or after the file is complete, until one gets through."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    # A process of its own: children forked from this one, with its threads, could wait for each other forever.
    command = [sys.executable, "-c", KILLED, str(model), str(tmp_path / "out"), repr(small)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    attempts, status = map(int, done.stdout.split())
    assert status == 0 and attempts > 8
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        api.quantize(model, tmp_path / "whole", small)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# -- what lies in the journal --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("part", "damage"), [("ends", flip), ("block-00000", truncate), ("block-00001", flip), ("block-00001", truncate)]
)
def test_a_damaged_part_is_made_again(
    part: str, damage: Callable[[Path], None], model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path
) -> None:
    begin(model, tmp_path, small)
    damage(tmp_path / FOLDER / f"{part}.safetensors")
    events: list[Event] = []
    api.quantize(model, tmp_path, small, progress=events.append)
    made = [f"block-{e.block:05d}" for e in events if e.kind == "block"]
    assert made == sorted({"block-00002", *([part] if part != "ends" else [])})
    assert any(e.message == "embedding and head" for e in events) == (part == "ends")
    assert contents(tmp_path) == expected


def test_half_written_files_are_ignored(model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path) -> None:
    begin(model, tmp_path, small)
    for name in ("block-00002.safetensors.tmp", "run.json.tmp"):
        (tmp_path / FOLDER / name).write_bytes(b"half")
    for name in ("model.safetensors.tmp", "tokenizer.json.tmp", ".bitfloor-probe", "bitfloor.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    api.quantize(model, tmp_path, small)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("left", [".bitfloor-probe", ".bitfloor-probe.tmp"])
def test_killed_while_it_tried_whether_the_folder_can_be_written(
    left: str, model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / left).touch()
    api.quantize(model, tmp_path, small)
    assert contents(tmp_path) == expected


def test_parts_of_an_unknown_run_are_not_used(
    model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path
) -> None:
    """What --no-resume leaves when it is killed while it removes the journal of another run."""
    begin(model, tmp_path, {**small, "spec": {"bits": 2, "group_size": 32}})
    (tmp_path / FOLDER / "run.json").unlink()
    api.quantize(model, tmp_path, small)
    assert contents(tmp_path) == expected


# -- another command -----------------------------------------------------------------------------------------------


def changed_weight(model: Path, folder: Path) -> Path:
    """A copy of a model with the lowest bit of one byte changed."""
    shutil.copytree(model, folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    return folder


def refused(model: Path, out: Path, chosen: Recipe) -> str:
    """What a command is told that does not fit the folder, which must stay as it is."""
    before = contents(out)
    with pytest.raises(InputError) as caught:
        api.quantize(model, out, chosen)
    assert contents(out) == before
    return str(caught.value)


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_another_command_is_refused_and_told_what_changed(
    state: str, model: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(Path(small["calibration"]["text"].removesuffix(":whole")).read_text())
    recipe = {**small, "calibration": {**small["calibration"], "text": f"{text}:whole"}}
    begin(model, out, recipe)
    if state == "finished":
        api.quantize(model, out, recipe)
    told = {
        "recipe": refused(model, out, {**recipe, "seed": 1}),
        "model": refused(changed_weight(model, tmp_path / "changed"), out, recipe),
    }
    before = text.read_text()
    text.write_text("#" + before[1:])  # the same path, another letter: only the tokens tell
    told["calibration tokens"] = refused(model, out, recipe)
    text.write_text(before)
    with monkeypatch.context() as patch:
        patch.setattr(quantize.torch, "get_num_threads", lambda: 97)
        told["threads"] = refused(model, out, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(quantize.torch, "__version__", "0.0.1")
        told["torch"] = refused(model, out, recipe)
    real = quantize.version
    for package in ("bitfloor", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "version", lambda name, old=package: "0.0.1" if name == old else real(name))
            told[package] = refused(model, out, recipe)
    for what, message in told.items():
        assert (
            f": {what} was " in message
            and ("finished checkpoint" if state == "finished" else "unfinished run") in message
        )
        assert "; " not in message and "--no-resume" in message, "it names what changed and nothing else"
    assert "0.0.1" in told["torch"] and "97" in told["threads"]
    api.quantize(model, out, recipe)  # the command itself is still welcome


def test_a_finished_folder_is_returned_at_once(
    model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = api.quantize(model, tmp_path, small)
    monkeypatch.setattr(Run, "execute", lambda self: pytest.fail("worked again"))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert api.quantize(model, tmp_path, small) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_no_resume_starts_over(
    state: str, model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path
) -> None:
    other = {**small, "spec": {"bits": 2, "group_size": 16}}
    begin(model, tmp_path, other)
    if state == "finished":
        api.quantize(model, tmp_path, other)
    events: list[Event] = []
    api.quantize(model, tmp_path, small, resume=False, progress=events.append)
    assert len([e for e in events if e.kind == "block"]) == 3
    assert contents(tmp_path) == expected


# -- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 3, 5, 7, 9, 12])
def test_a_full_disk_is_a_sentence_and_the_run_can_go_on(
    call: int, model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the ``call``-th file: the probe, the journal's, the shards, the tokenizer's, the report."""
    with monkeypatch.context() as patch:
        real = os.fsync
        files = [call]

        def full(descriptor: int) -> None:
            # Folders are flushed too, through a descriptor opened for reading only.
            files[0] -= not os.path.isdir(f"/proc/self/fd/{descriptor}")
            if files[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        patch.setattr(atomic.os, "fsync", full)
        with pytest.raises(BitfloorError, match="the disk is full: .* finished work is kept") as caught:
            api.quantize(model, tmp_path, small)
    assert not isinstance(caught.value, InputError) and not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "config.json").exists()
    events: list[Event] = []
    api.quantize(model, tmp_path, small, progress=events.append)
    finished = min(3, max(0, call - 4))  # files before the first block: the probe, run.json, embedding and head
    assert len([e for e in events if e.kind == "block"]) == 3 - finished
    assert contents(tmp_path) == expected


def test_a_changed_weight_changes_the_result(
    model: Path, small: Recipe, expected: dict[str, str], tmp_path: Path
) -> None:
    """The comparisons above would be worth nothing if everything gave the same bytes."""
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][3] *= 1.5
    save_file(tensors, path, {"format": "pt"})
    api.quantize(tmp_path / "model", tmp_path / "out", small)
    found = contents(tmp_path / "out")
    assert set(found) == set(expected)
    assert found["model.safetensors"] != expected["model.safetensors"]
    assert found["tokenizer.json"] == expected["tokenizer.json"]

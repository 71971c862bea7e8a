"""The golden checkpoints, made by a script that knows only the document, against this implementation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitfloor import api
from bitfloor.core.packed import dequantize, nbytes
from bitfloor.formats.checkpoint import Checkpoint, read_checkpoint
from bitfloor.formats.files import open_tensors
from bitfloor.formats.native import decode, encode, layout
from bitfloor.formats.shards import CheckpointWriter
from bitfloor.formats.verify import verify_checkpoint

HERE = Path(__file__).parent
FILES = ("model.safetensors", "expected.safetensors", "config.json")
VERSIONS = {"v0": 16, "v1": 22}  # and how many matrices each has


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest) -> Checkpoint:
    return read_checkpoint(HERE / request.param)


@pytest.fixture(scope="module")
def write() -> Callable[[Path, int], None]:
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_script_still_writes_the_committed_files(tmp_path: Path, write: Callable[[Path, int], None]) -> None:
    for number, version in enumerate(VERSIONS):
        write(tmp_path / version, number)
        for name in FILES:
            assert (tmp_path / version / name).read_bytes() == (HERE / version / name).read_bytes(), (version, name)
    assert sum((HERE / version / name).stat().st_size for name in FILES for version in VERSIONS) < 160_000
    assert "import bitfloor" not in (HERE / "make_golden.py").read_text()


def test_every_weight_is_the_documented_one(golden: Checkpoint) -> None:
    tensors = open_tensors(golden.folder / "model.safetensors")
    expected = open_tensors(golden.folder / "expected.safetensors")
    native = golden.native
    assert len(native.matrices) == VERSIONS[golden.folder.name] and golden.folder.name == f"v{native.version}"
    for name in native.matrices:
        weight = decode(name, native.layout_of(name), tensors.__getitem__, native.orders.get(name))
        if weight.rotation:  # sums, so the last bits are free
            torch.testing.assert_close(dequantize(weight), expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(dequantize(weight), expected[name]), name
        shared = nbytes(weight)["order"] if name in native.orders else 0
        assert sum(nbytes(weight).values()) - shared == golden.matrix_bytes(name)


def test_this_implementation_writes_the_same_bytes(golden: Checkpoint, tmp_path: Path) -> None:
    """Of version 0 the tensors, of version 1 the file."""
    tensors = open_tensors(golden.folder / "model.safetensors")
    native = golden.native
    writer = CheckpointWriter(tmp_path)
    for name in sorted(native.matrices, key=native.matrices.__getitem__):  # as the script wrote them
        described, order_of = native.layout_of(name), native.orders.get(name)
        weight = decode(name, described, tensors.__getitem__, order_of)
        assert layout(weight, described["kind"], described["transposed"]) == described
        for tensor_name, tensor in encode(name, weight, order_of).items():
            writer.add_tensor(tensor_name, tensor)
    for name in native.kept:
        writer.add_tensor(name, tensors[name])
    writer.write()
    written, committed = (folder / "model.safetensors" for folder in (tmp_path, golden.folder))
    if native.version:
        assert written.read_bytes() == committed.read_bytes()
    else:
        assert _data(written) == _data(committed)


def test_the_checksum_is_the_documented_one_and_version_0_has_none() -> None:
    found = verify_checkpoint(read_checkpoint(HERE / "v1"))
    assert list(found.files) == ["model.safetensors"] and found.without == ()
    assert verify_checkpoint(read_checkpoint(HERE / "v0")).without == ("model.safetensors",)


def test_migrated_golden_files_are_those_of_version_1_but_for_what_it_has_more(tmp_path: Path) -> None:
    assert api.migrate(HERE / "v0", tmp_path / "out")["to"] == 1
    migrated = read_checkpoint(tmp_path / "out")
    assert migrated.native.version == 1 and migrated.native.matrices == read_checkpoint(HERE / "v0").native.matrices
    assert _data(tmp_path / "out" / "model.safetensors") == _data(HERE / "v0" / "model.safetensors")
    assert not verify_checkpoint(migrated).without


def _data(path: Path) -> bytes:
    """A safetensors file without its header."""
    file = path.read_bytes()
    return file[8 + int.from_bytes(file[:8], "little") :]

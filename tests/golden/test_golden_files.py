"""The golden checkpoint, made by a script that knows only the document, against this implementation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bitfloor.core.packed import dequantize, nbytes
from bitfloor.formats.checkpoint import Checkpoint, read_checkpoint
from bitfloor.formats.files import open_tensors
from bitfloor.formats.native import decode, encode, layout
from bitfloor.formats.shards import CheckpointWriter

HERE = Path(__file__).parent
FILES = ("model.safetensors", "expected.safetensors", "config.json")


@pytest.fixture(scope="module")
def golden() -> Checkpoint:
    return read_checkpoint(HERE / "v0")


def test_the_script_still_writes_the_committed_files(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (HERE / "v0" / name).read_bytes(), name
    assert sum((HERE / "v0" / name).stat().st_size for name in FILES) < 70_000
    assert "import bitfloor" not in (HERE / "make_golden.py").read_text()


def test_every_weight_is_the_documented_one(golden: Checkpoint) -> None:
    tensors = open_tensors(HERE / "v0" / "model.safetensors")
    expected = open_tensors(HERE / "v0" / "expected.safetensors")
    assert len(golden.native.matrices) == 16
    for name in golden.native.matrices:
        weight = decode(name, golden.native.layout_of(name), tensors.__getitem__)
        if weight.rotation:  # sums, so the last bits are free
            torch.testing.assert_close(dequantize(weight), expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(dequantize(weight), expected[name]), name
        assert sum(nbytes(weight).values()) == golden.matrix_bytes(name)


def test_this_implementation_writes_the_same_bytes(golden: Checkpoint, tmp_path: Path) -> None:
    tensors = open_tensors(HERE / "v0" / "model.safetensors")
    writer = CheckpointWriter(tmp_path)
    for name in sorted(golden.native.matrices, key=golden.native.matrices.__getitem__):  # as the script wrote them
        described = golden.native.layout_of(name)
        weight = decode(name, described, tensors.__getitem__)
        assert layout(weight) == described
        for tensor_name, tensor in encode(name, weight).items():
            writer.add_tensor(tensor_name, tensor)
    writer.write()
    assert (tmp_path / "model.safetensors").read_bytes() == (HERE / "v0" / "model.safetensors").read_bytes()

"""Checksums of shards: every flipped byte is found; and files that are not of one checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from packing import random_segment
from safetensors.torch import load_file, save_file

from bitfloor.core.errors import InputError
from bitfloor.core.headers import SHARD_CHECKSUM, read_header
from bitfloor.core.packed import PackedWeight
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.formats.layout import build_config
from bitfloor.formats.native import encode, layout
from bitfloor.formats.shards import CheckpointWriter, rewrite_shard
from bitfloor.formats.verify import shard_checksum, verify_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two matrices with orders and channels and a kept tensor, in several shards."""
    generator = torch.Generator().manual_seed(0)
    order, channels = torch.randperm(40, generator=generator), torch.randperm(40, generator=generator)
    writer = CheckpointWriter(tmp_path / "made", 2600)
    layouts = {}
    for name in ("a", "b"):
        weight = PackedWeight((18, 40), (random_segment(generator, 18, 40, 3),), order, channels=channels)
        layouts[name] = layout(weight)
        for tensor_name, tensor in encode(name, weight).items():
            writer.add_tensor(tensor_name, tensor)
    writer.add_tensor("norm.weight", torch.ones(7))
    assert len(writer.write()) == 2
    writer.finish({"model_type": "x", "quantization_config": build_config(layouts, kept=["norm.weight"]).to_dict()})
    return tmp_path / "made"


def _edit(folder: Path, name: str, value: torch.Tensor) -> None:
    """Store a tensor of other values, without a checksum."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file({**tensors, name: value.to(tensors[name].dtype)}, path, {"format": "pt"})


def test_what_was_written_is_verified(folder: Path) -> None:
    found = verify_checkpoint(read_checkpoint(folder))
    assert len(found.files) == 2 and found.without == ()
    for name in found.files:
        said, own, _ = shard_checksum(folder / name)
        assert said == own == read_header(folder / name).metadata[SHARD_CHECKSUM]


def test_every_byte_counts(folder: Path) -> None:
    """Also those of the header that no check of shapes looks at: padding, and the name of a kept tensor."""
    path = sorted(folder.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    key = whole.index(SHARD_CHECKSUM.encode())
    for at in range(8, len(whole), 17):
        data = bytearray(whole)
        data[at] ^= 4
        path.write_bytes(data)
        if key <= at < key + len(SHARD_CHECKSUM):  # the one thing that damage can take away: it is said
            assert verify_checkpoint(read_checkpoint(folder)).without == (path.name,)
            continue
        with pytest.raises(InputError):
            verify_checkpoint(read_checkpoint(folder))
    path.write_bytes(whole)
    assert not verify_checkpoint(read_checkpoint(folder)).without


def test_a_file_that_another_program_wrote_has_none(folder: Path) -> None:
    _edit(folder, "norm.weight", torch.zeros(7))
    assert len(verify_checkpoint(read_checkpoint(folder)).without) == 1


def test_a_shard_of_another_run_is_found_by_the_report(folder: Path) -> None:
    """Its own checksum is right, its shapes too."""
    report = verify_checkpoint(read_checkpoint(folder)).files
    for path in folder.glob("*.safetensors"):
        if "norm.weight" in read_header(path).tensors:
            _edit(folder, "norm.weight", torch.zeros(7))
            rewrite_shard(path, path)
    verify_checkpoint(read_checkpoint(folder))
    with pytest.raises(InputError, match="is damaged: its bytes are not those that were written"):
        verify_checkpoint(read_checkpoint(folder), report)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.order", torch.arange(40) + 1, "a.order names entry 40 of 40"),
        ("b.channels", torch.arange(40).clamp(max=38), "b.channels is no order of its 40 input channels"),
    ],
)
def test_indices_must_point_somewhere(folder: Path, name: str, value: torch.Tensor, message: str) -> None:
    _edit(folder, name, value)
    with pytest.raises(InputError, match=message):
        verify_checkpoint(read_checkpoint(folder))


def test_files_of_two_checkpoints_are_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    kept = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(InputError, match="the shards are of two checkpoints"):
        read_checkpoint(folder)
    second.write_bytes(kept)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for change, message in (
        ({"norm.weight": first.name}, "has tensor 'norm.weight' in model-00001-of-00002.safetensors and it is in"),
        ({"more": first.name}, "has tensor 'more' in .* and it is in no file"),
        ({"norm.weight": "../made/" + second.name}, "names '../made/.*', which is no name of a shard"),
        ({"norm.weight": 3}, "has no weight_map"),
    ):
        changed = {**index, "weight_map": index["weight_map"] | change}
        (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            read_checkpoint(folder)


def test_a_key_that_stands_twice_is_refused(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type"', '"model_type": "y",\n  "model_type"', 1))
    with pytest.raises(InputError, match="the key 'model_type' stands twice"):
        read_checkpoint(folder)

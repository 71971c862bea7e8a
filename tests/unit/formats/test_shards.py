"""The checkpoint writer: sizes, names, determinism, and what it does when the disk lies."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import rtn
from safetensors.torch import load_file, save_file

from bitfloor.core.errors import BitfloorError
from bitfloor.core.headers import read_header
from bitfloor.formats import shards
from bitfloor.formats.files import CorruptArtifact, write_artifact
from bitfloor.formats.layout import build_config
from bitfloor.formats.native import encode, layout
from bitfloor.formats.shards import CheckpointWriter


def _blocks(folder: Path, count: int = 3) -> list[Path]:
    paths = []
    for k in range(count):
        tensors = {
            f"b.{k}.zero": torch.full((5,), k, dtype=torch.uint8),
            f"b.{k}.scale": torch.full((2, 3), float(k), dtype=torch.float16),
            f"b.{k}.codes": torch.full((2, 64), k, dtype=torch.uint8),
        }
        paths.append(folder / f"block-{k}")
        write_artifact(paths[-1], tensors)
    return paths


def _write(folder: Path, blocks: list[Path], limit: int = 10**9) -> dict[str, str]:
    writer = CheckpointWriter(folder, limit)
    for path in blocks:
        writer.add_artifact(path)
    written = writer.write()
    writer.finish({"model_type": "x"})
    return written


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    _write(tmp_path / "out", _blocks(tmp_path))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert len(loaded) == 9 and torch.equal(loaded["b.2.scale"], torch.full((2, 3), 2.0, dtype=torch.float16))
    entries = read_header(tmp_path / "out" / "model.safetensors").tensors
    assert [name for name in list(entries)[:3]] == ["b.0.codes", "b.1.codes", "b.2.codes"]
    assert all(entry.start % 64 == 0 for name, entry in entries.items() if name.endswith("codes"))


def test_shards_stay_below_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    limit = 700
    written = _write(tmp_path / "out", _blocks(tmp_path, 6), limit)
    assert len(written) > 1 and all(name.endswith(f"-of-{len(written):05d}.safetensors") for name in written)
    assert all((tmp_path / "out" / name).stat().st_size <= limit for name in written)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 * (5 + 12 + 128)
    for name, file_name in index["weight_map"].items():
        assert name in read_header(tmp_path / "out" / file_name).tensors
    assert len(index["weight_map"]) == 18


def test_a_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 300)
    for name, count in (("a", 10), ("b", 5000), ("c", 10)):
        writer.add_tensor(name, torch.zeros(count, dtype=torch.uint8))
    assert [names for _, names in writer.plan()] == [["a"], ["b"], ["c"]]
    assert len(writer.write()) == 3


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    blocks = _blocks(tmp_path)
    assert _write(tmp_path / "a", blocks, 500) == _write(tmp_path / "b", blocks, 500)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_old_shards_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    blocks = _blocks(tmp_path)
    out = tmp_path / "out"
    _write(out, blocks, 500)
    (out / "tokenizer.json").write_text("{}")
    (out / "model.safetensors.tmp").write_text("left by a killed process")
    _write(out, blocks)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_without_the_last_step_the_folder_is_no_model(tmp_path: Path) -> None:
    blocks = _blocks(tmp_path)
    _write(tmp_path / "out", blocks)
    writer = CheckpointWriter(tmp_path / "out")
    writer.add_artifact(blocks[0])
    writer.write()
    assert not (tmp_path / "out" / "config.json").exists()


def test_tensors_of_other_files_and_from_memory(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.zeros(3)}, tmp_path / "source.safetensors")
    writer = CheckpointWriter(tmp_path / "out")
    writer.add_from_file("renamed", tmp_path / "source.safetensors", "a")
    writer.add_tensor("mine", torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(BitfloorError, match="no tensor 'none'"):
        writer.add_from_file("x", tmp_path / "source.safetensors", "none")
    with pytest.raises(BitfloorError, match="two tensors are named 'mine'"):
        writer.add_tensor("mine", torch.ones(2))
    writer.write()
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded["renamed"].tolist() == [0, 1, 2, 3] and loaded["mine"].dtype == torch.bfloat16


def test_a_damaged_artefact_stops_the_writer_before_it_writes(tmp_path: Path) -> None:
    path = _blocks(tmp_path, 1)[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    writer = CheckpointWriter(tmp_path / "out")
    with pytest.raises(CorruptArtifact, match="damaged"):
        writer.add_artifact(path)


def test_a_disk_that_stores_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shards._read_back

    def flip_then_read(path: Path, *rest: Any) -> str:
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
        return honest(path, *rest)

    monkeypatch.setattr(shards, "_read_back", flip_then_read)
    with pytest.raises(BitfloorError, match=r"model\.safetensors differs from what was written"):
        _write(tmp_path / "out", _blocks(tmp_path))
    assert list((tmp_path / "out").iterdir()) == []


def test_memory_stays_flat_while_merging(tmp_path: Path) -> None:
    paths = []
    for k in range(3):
        paths.append(tmp_path / f"block-{k}")
        write_artifact(paths[-1], {f"{k}.codes": torch.zeros(1 << 25, dtype=torch.uint8)})
    tracemalloc.start()
    _write(tmp_path / "out", paths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Chunks are 8 MiB; two may be alive at once while the next is read. One tensor alone is 32 MiB.
    assert peak < 20 << 20


@pytest.mark.parametrize(("given", "expected"), [(None, "bfloat16"), ("float16", "float16")])
def test_the_dtype_to_compute_in_is_written_down(tmp_path: Path, given: str | None, expected: str) -> None:
    writer = CheckpointWriter(tmp_path)
    weight = rtn(torch.randn(20, 900, generator=torch.Generator().manual_seed(0)), 2, 16)
    for name, tensor in encode("a", weight).items():
        writer.add_tensor(name, tensor)
    writer.add_tensor("small", torch.zeros(2))
    writer.add_tensor("norm", torch.zeros(64, dtype=torch.bfloat16))
    writer.write()
    config = build_config({"a": layout(weight)}, kept=["small", "norm"])
    writer.finish({"dtype": given, "quantization_config": config.to_dict()})
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == expected


@pytest.mark.parametrize(
    ("kept", "message"), [(["a", "b"], "'b' is missing"), ([], "'a' in .* is neither packed nor kept")]
)
def test_a_configuration_must_account_for_every_tensor(tmp_path: Path, kept: list[str], message: str) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.add_tensor("a", torch.zeros(2))
    writer.write()
    with pytest.raises(BitfloorError, match=message):
        writer.finish({"quantization_config": build_config({}, kept=kept).to_dict()})
    assert not (tmp_path / "config.json").exists()

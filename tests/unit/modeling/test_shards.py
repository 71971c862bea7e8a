"""Shard headers: a healthy one is read exactly, a damaged one becomes a sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.modeling.shards import list_tensors, read_header, read_tensor, same_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def write(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_read_as_the_safetensors_package_wrote_them(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "a": torch.arange(15).reshape(3, 5).to(dtype),
        "b": torch.tensor(1).to(dtype),
        "c": torch.zeros(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    infos = list_tensors(tmp_path)
    assert set(infos) == set(tensors)
    for name, tensor in tensors.items():
        assert infos[name].dtype == dtype and infos[name].shape == tuple(tensor.shape)
        assert torch.equal(read_tensor(infos[name]), tensor)


def test_read_tensors_own_their_memory(tmp_path: Path) -> None:
    save_file({"a": torch.arange(64.0), "b": torch.arange(3.0)}, tmp_path / "model.safetensors")
    infos = list_tensors(tmp_path)
    first = read_tensor(infos["b"])
    (tmp_path / "model.safetensors").unlink()
    assert first.untyped_storage().nbytes() == 12 and first.tolist() == [0, 1, 2]
    assert first.data_ptr() % 64 == 0


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DAMAGE: list[tuple[str, Callable[[Path], Path], str]] = [
    ("empty file", lambda p: write(p, b"", length=0) if p.write_bytes(b"") else p, "truncated"),
    ("header longer than the file", lambda p: write(p, {"a": ENTRY}, bytes(16), length=10**6), "a header of 1000000"),
    ("absurd header", lambda p: write(p, {"a": ENTRY}, bytes(16), length=2**63), "truncated or is not"),
    ("not JSON", lambda p: write(p, b"{nonsense", bytes(16)), "corrupt header"),
    ("not UTF-8", lambda p: write(p, b"\xff\xfe{}", bytes(16)), "corrupt header"),
    ("a list", lambda p: write(p, b"[1, 2]", bytes(16)), "corrupt header"),
    ("no offsets", lambda p: write(p, {"a": {"dtype": "F32", "shape": [4]}}, bytes(16)), "corrupt header"),
    ("unknown dtype", lambda p: write(p, {"a": {**ENTRY, "dtype": "F4"}}, bytes(16)), "type F4"),
    ("data cut off", lambda p: write(p, {"a": ENTRY}, bytes(15)), "truncated or damaged"),
    (
        "shape and bytes disagree",
        lambda p: write(p, {"a": {**ENTRY, "shape": [2, 3]}}, bytes(16)),
        "does not fill",
    ),
    ("negative shape", lambda p: write(p, {"a": {**ENTRY, "shape": [-2, -2]}}, bytes(16)), "corrupt"),
    ("overlap", lambda p: write(p, {"a": ENTRY, "b": ENTRY}, bytes(16)), "begins at byte"),
    ("hole", lambda p: write(p, {"a": {**ENTRY, "data_offsets": [4, 20]}}, bytes(20)), "begins at byte"),
    ("bytes left over", lambda p: write(p, {"a": ENTRY}, bytes(17)), "truncated or damaged"),
]


@pytest.mark.parametrize(("make", "words"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_damaged_header_is_refused_with_the_file(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 3), "b": torch.ones(2)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for size in range(len(whole)):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole[:size])
        with pytest.raises(InputError):
            read_header(cut)


def test_a_file_that_shrinks_while_reading_fails_the_run(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8)}, tmp_path / "model.safetensors")
    info = list_tensors(tmp_path)["a"]
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BitfloorError, match="changed while it was being read"):
        read_tensor(info)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BitfloorError, match="cannot read the tensor a"):
        read_tensor(info)


def sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_sharded_checkpoint_is_listed(tmp_path: Path) -> None:
    assert sorted(list_tensors(sharded(tmp_path))) == ["a", "b"]


def test_index_naming_a_missing_file(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="names the shard model-00002-of-00002.safetensors, which is not there"):
        list_tensors(tmp_path)


def test_shard_missing_from_the_index(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), lambda m: m.pop("b"))
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors is missing from"):
        list_tensors(tmp_path)


def test_tensor_the_index_does_not_know(tmp_path: Path) -> None:
    edit_index(
        sharded(tmp_path),
        lambda m: m.update(b="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors"),
    )
    with pytest.raises(InputError, match="holds the tensor b, but"):
        list_tensors(tmp_path)


def test_tensor_the_shard_does_not_hold(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), lambda m: m.update(c="model-00001-of-00002.safetensors"))
    with pytest.raises(InputError, match="places the tensor c in model-00001"):
        list_tensors(tmp_path)


def test_index_that_leaves_the_folder(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), lambda m: m.update(b="../elsewhere.safetensors"))
    with pytest.raises(InputError, match="outside its folder"):
        list_tensors(tmp_path)


def test_index_without_a_map_or_without_json(tmp_path: Path) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        list_tensors(tmp_path)
    index.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        list_tensors(tmp_path)


def test_folder_without_weights_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json but no weights"):
        list_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="is a pickle"):
        list_tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match=r"no model\.safetensors\.index\.json"):
        list_tensors(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="remove one of the two"):
        list_tensors(tmp_path)


def test_unreadable_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        list_tensors(tmp_path)


def test_same_bytes_compares_values_dtypes_and_shapes(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    save_file(
        {"a": base, "b": base.clone(), "c": base + 1, "d": base.half(), "e": base.reshape(2, 3).clone()},
        tmp_path / "model.safetensors",
    )
    infos = list_tensors(tmp_path)
    assert [same_bytes(infos["a"], infos[n]) for n in "abcde"] == [True, True, False, False, False]

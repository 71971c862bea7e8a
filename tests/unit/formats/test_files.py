"""Artefacts: the same bytes for the same content, no damage unnoticed, nothing left behind when the disk refuses."""

from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.headers import ITEM_BYTES, read_header
from bitfloor.formats import atomic
from bitfloor.formats.files import (
    CHECKSUM,
    TORCH_DTYPES,
    CorruptArtifact,
    open_tensors,
    read_artifact,
    verify_artifact,
    write_artifact,
)

TENSORS = {
    "w.zero": torch.arange(7, dtype=torch.uint8),
    "w.scale": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "w.codes": torch.arange(128, dtype=torch.uint8).reshape(2, 64),
    "w.order": torch.tensor([3, 1, 60000]).to(torch.uint16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "strided": torch.arange(12.0).reshape(3, 4).T,
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    checksum = write_artifact(tmp_path / "a", TENSORS, {"block": "3"})
    tensors, metadata = read_artifact(tmp_path / "a")
    assert metadata == {"block": "3"}
    assert set(tensors) == set(TENSORS)
    assert all(tensors[name].dtype == t.dtype and torch.equal(tensors[name], t) for name, t in TENSORS.items())
    assert verify_artifact(tmp_path / "a").metadata[CHECKSUM] == checksum
    lazy = open_tensors(tmp_path / "a")
    assert "w.scale" in lazy and sorted(lazy) == sorted(TENSORS)
    assert torch.equal(lazy["w.scale"], TENSORS["w.scale"])


def test_the_safetensors_library_agrees(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a.safetensors", TENSORS)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_every_element_type_has_its_size() -> None:
    assert {name: torch.empty(0, dtype=dtype).element_size() for name, dtype in TORCH_DTYPES.items()} == ITEM_BYTES


def test_codes_come_first_on_cache_lines_and_the_rest_is_aligned_to_its_elements(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", TENSORS)
    entries = read_header(tmp_path / "a").tensors
    assert next(iter(entries)) == "w.codes" and entries["w.codes"].start % 64 == 0
    assert all(entry.start % ITEM_BYTES[entry.dtype] == 0 for entry in entries.values())


def test_equal_content_gives_equal_bytes_whatever_the_metadata_order(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", TENSORS, {"x": "1", "y": "2"})
    write_artifact(tmp_path / "b", TENSORS, {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_artifact(path, {"x": torch.arange(9, dtype=torch.int32)}, {"note": "abc"})
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        try:
            tensors, metadata = read_artifact(path)
        except CorruptArtifact:
            continue
        # Bytes that carry nothing (padding that is still white space) may change; content may not.
        assert torch.equal(tensors["x"], torch.arange(9, dtype=torch.int32)) and metadata == {"note": "abc"}, position


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_file_is_noticed(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a"
    write_artifact(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptArtifact):
        verify_artifact(path)


def test_a_file_without_a_checksum_is_no_artefact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", {"x": torch.zeros(1)})
    path = tmp_path / "a"
    path.write_bytes(path.read_bytes().replace(CHECKSUM.encode(), b"x" * len(CHECKSUM)))
    with pytest.raises(CorruptArtifact, match="should be none"):
        read_artifact(path)


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", {"x": torch.arange(5)})
    tensor = open_tensors(tmp_path / "a")["x"]
    (tmp_path / "a").write_bytes(b"")
    tensor += 1  # memory of its own, writable
    assert tensor.tolist() == [1, 2, 3, 4, 5]


def test_unsupported_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BitfloorError, match="complex64"):
        write_artifact(tmp_path / "a", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


class _FailingFile(io.BytesIO):
    """A file on a device that refuses to take more."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def write(self, data: Any) -> int:
        raise OSError(self.code, "refused")


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOSPC, BitfloorError, "the disk is full"),
        (errno.EDQUOT, BitfloorError, "the disk is full"),
        (errno.EACCES, InputError, "no permission to write"),
        (errno.EROFS, InputError, "read-only file system"),
        (errno.ENOENT, InputError, "check the output path"),
        (errno.EIO, BitfloorError, "check the disk"),
    ],
)
def test_a_disk_that_refuses_gets_a_sentence_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[BitfloorError], message: str
) -> None:
    path = tmp_path / "a"
    write_artifact(path, {"x": torch.zeros(1)})
    before = path.read_bytes()
    real_open = Path.open

    def failing_open(self: Path, mode: str = "r", **rest: Any) -> Any:
        if "w" in mode:
            real_open(self, mode).close()
            return _FailingFile(code)
        return real_open(self, mode, **rest)

    monkeypatch.setattr(Path, "open", failing_open)
    with pytest.raises(kind, match=message) as caught:
        write_artifact(path, {"x": torch.ones(1)})
    assert type(caught.value) is kind and str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the output path"):
        write_artifact(tmp_path / "none" / "a", {"x": torch.zeros(1)})


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic.atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_of_a_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(InputError, match="check the output path"):
        atomic.make_folder(tmp_path / "a" / "b")


def test_json_is_sorted_and_bad_json_is_a_sentence(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        atomic.read_json(tmp_path / "a.json")

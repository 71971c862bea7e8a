"""Streams: the same list of batches in memory and on disk, replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitfloor.calib.streams import Stream
from bitfloor.core.errors import BitfloorError


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3 + i, 5, generator=generator) for i in range(count)]


@pytest.fixture(params=["memory", "files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "spill" if request.param == "files" else None


def test_a_stream_is_the_list_it_was_given(folder: Path | None) -> None:
    given = batches()
    stream = Stream(given, folder)
    assert len(stream) == 3 and stream.shapes == [b.shape for b in given]
    assert stream.nbytes == sum(b.nbytes for b in given)
    assert all(torch.equal(a, b) for a, b in zip(stream, given, strict=True))
    assert torch.equal(stream[-1], given[-1])
    with pytest.raises(IndexError):
        stream[3]


def test_batches_are_replaced_in_place(folder: Path | None) -> None:
    stream = Stream(batches(), folder)
    other = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1))
    stream[1] = other
    assert torch.equal(stream[1], other) and stream.shapes[1] == other.shape and len(stream) == 3
    assert torch.equal(stream[2], batches()[2])


def test_views_and_gradients_are_stored_plain(folder: Path | None) -> None:
    wide = torch.randn(2, 3, 10, requires_grad=True)
    stream = Stream([wide.transpose(0, 1)[..., ::2]], folder)
    assert torch.equal(stream[0], wide.detach().transpose(0, 1)[..., ::2])
    assert not stream[0].requires_grad and stream[0].is_contiguous()


def test_only_float32_is_taken(folder: Path | None) -> None:
    with pytest.raises(BitfloorError, match=r"float32 hidden states, not torch\.float16"):
        Stream([torch.zeros(1, 1, 1, dtype=torch.float16)], folder)


def test_spilled_batches_are_not_kept_in_memory(tmp_path: Path) -> None:
    stream = Stream(batches(), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == stream.nbytes
    first, second = stream[0], stream[0]
    assert first.data_ptr() != second.data_ptr()
    first.zero_()
    assert torch.equal(stream[0], second)
    stream.close()
    assert not tmp_path.exists() and len(stream) == 0


def test_closing_leaves_other_files_alone(tmp_path: Path) -> None:
    stream = Stream(batches(), tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    stream.close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_write_leaves_the_old_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(batches(), tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BitfloorError, match="No space left on device"):
        stream[1] = torch.zeros(2, 4, 5)
    monkeypatch.undo()
    assert torch.equal(stream[1], batches()[1])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".f32"] * 3


def test_lost_and_cut_files_fail_the_run(tmp_path: Path) -> None:
    stream = Stream(batches(), tmp_path)
    paths = sorted(tmp_path.iterdir())
    paths[0].write_bytes(b"1234")
    with pytest.raises(BitfloorError, match="shorter than it was written"):
        stream[0]
    paths[1].unlink()
    with pytest.raises(BitfloorError, match="cannot read the spilled batch"):
        stream[1]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BitfloorError, match="cannot make the spill folder"):
        Stream(folder=tmp_path / "file" / "sub")

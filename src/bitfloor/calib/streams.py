"""Hidden states on their way from block to block: a list of batches, in memory or in files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError


class Stream:
    """A list of float32 tensors ``[B, T, D]`` of which, when spilled, only the one in use is in memory.

    The states of all calibration batches are the largest thing bitfloor holds beside a block; on disk they cost one
    batch. Files are replaced atomically, so an interrupted run never leaves half a batch under a valid name.

    Args:
        batches: first contents.
        folder: spill there; None keeps the batches in memory. The folder is made if needed.

    Raises:
        BitfloorError: the folder cannot be written (no space, no permission).
    """

    def __init__(self, batches: Iterable[Tensor] = (), folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._memory: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BitfloorError(f"cannot make the spill folder {self._folder}: {error.strerror}.") from error
        for batch in batches:
            self.append(batch)

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Tensor:
        """Batch ``i``; from files, a fresh tensor each time."""
        i = self._index(i)
        return self._memory[i] if self._folder is None else self._read(i)

    def __setitem__(self, i: int, batch: Tensor) -> None:
        """Replace batch ``i``, whole or not at all."""
        i = self._index(i)
        if self._folder is None:
            self._memory[i] = _plain(batch)
        else:
            self._write(i, _plain(batch))
        self._shapes[i] = batch.shape

    def append(self, batch: Tensor) -> None:
        """Add one batch at the end."""
        if self._folder is None:
            self._memory.append(_plain(batch))
        else:
            self._write(len(self), _plain(batch))
        self._shapes.append(batch.shape)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shape of every batch, without reading any."""
        return list(self._shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of all batches, wherever they are."""
        return 4 * sum(shape.numel() for shape in self._shapes)

    def close(self) -> None:
        """Drop the contents, delete the files that were written, and the folder if nothing else is in it."""
        if self._folder is not None:
            for i in range(len(self)):
                self._path(i).unlink(missing_ok=True)
            with suppress(OSError):
                self._folder.rmdir()
        self._memory.clear()
        self._shapes.clear()

    def _index(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        return i % len(self)

    def _path(self, i: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{i:06d}.f32"

    def _write(self, i: int, batch: Tensor) -> None:
        path = self._path(i)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with scratch.open("wb", buffering=0) as file:
                view = memoryview(batch.cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                done = 0
                while done < len(view):
                    done += file.write(view[done:])
            os.replace(scratch, path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise BitfloorError(
                f"cannot spill {batch.nbytes} bytes to {path}: {error.strerror}; free some space or spill elsewhere."
            ) from error

    def _read(self, i: int) -> Tensor:
        path = self._path(i)
        batch = torch.empty(self._shapes[i], dtype=torch.float32)
        view = memoryview(batch.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with path.open("rb", buffering=0) as file:
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise BitfloorError(
                            f"the spilled batch {path} is shorter than it was written; start the run again."
                        )
                    done += count
        except OSError as error:
            raise BitfloorError(
                f"cannot read the spilled batch {path}: {error.strerror}; start the run again."
            ) from error
        return batch


def _plain(batch: Tensor) -> Tensor:
    if batch.dtype != torch.float32:
        raise BitfloorError(f"a stream holds float32 hidden states, not {batch.dtype}; convert them first.")
    return batch.detach().contiguous()

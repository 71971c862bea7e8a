"""Headers: what other readers see, alignment, and every kind of damage named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitfloor.core.errors import InputError
from bitfloor.core.headers import ALIGNMENT, build_header, read_header


def test_the_safetensors_library_reads_what_is_built(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = build_header({"b": ("U8", (2, 64)), "a": ("F16", (3,))}, {"format": "pt"})
    path.write_bytes(header + bytes(range(128)) + b"\0\x3c" * 3)
    assert len(header) % ALIGNMENT == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("a"), torch.ones(3, dtype=torch.float16))
        assert torch.equal(file.get_tensor("b").reshape(-1), torch.arange(128, dtype=torch.uint8))


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(0, 5), "s": torch.tensor(1.0)}, path)
    header = read_header(path)
    found = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    assert found == {"x": ("F32", (2, 3)), "y": ("F32", (0, 5)), "s": ("F32", ())}
    assert max(entry.stop for entry in header.tensors.values()) == path.stat().st_size


def _file(path: Path, content: object, data: bytes) -> Path:
    text = json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _one(dtype: str = "U8", shape: tuple[int, ...] = (4,), offsets: tuple[int, int] = (0, 4)) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("content", "data", "message"),
    [
        (_one(), b"abc", "truncated or damaged"),
        (_one(), b"abcde", "truncated or damaged"),
        (_one(offsets=(1, 5)), b"abcde", "begins at byte"),
        (_one(dtype="Q9"), b"abcd", "has type Q9, which bitfloor cannot read"),
        (_one(shape=(5,)), b"abcd", "does not fill"),
        (_one(shape=(-4,)), b"abcd", "does not fill"),
        ({"x": {"shape": [4]}}, b"abcd", "corrupt header"),
        ({"x": 3}, b"abcd", "corrupt header"),
        ([1], b"", "corrupt header"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: object, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_header(_file(tmp_path / "a.safetensors", content, data))


@pytest.mark.parametrize("data", [b"", b"abc", b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match="truncated or is not a safetensors file"):
        read_header(path)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


def test_headers_and_checkpoints_are_read_without_torch() -> None:
    code = (
        "import sys, bitfloor.formats.checkpoint, bitfloor.core.headers, bitfloor.formats.detect\n"
        "print(sorted({'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

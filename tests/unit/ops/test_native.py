"""When the native library is used, and what is said when it is not; `bitfloor env` says the same."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitfloor.core.errors import InputError
from bitfloor.environment import environment
from bitfloor.ops import native


def placed(folder: Path, content: bytes = b"") -> Path:
    (folder / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    return folder


def saying(number: int) -> Callable[[str], SimpleNamespace]:
    """Stands for ``ctypes.CDLL``: a library with that number and no other function."""
    return lambda path: SimpleNamespace(bitfloor_abi=lambda: number)


def test_nothing_built(tmp_path: Path) -> None:
    assert "it was not built" in native.load(tmp_path).reason


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    found = native.load(placed(tmp_path, b"not a library"))
    assert found.library is None and "it cannot be loaded (_native" in found.reason
    assert str(tmp_path) not in found.reason


def test_a_library_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", saying(native.ABI + 1))
    found = native.load(placed(tmp_path))
    assert found.library is None and "it was built from another version" in found.reason
    assert "install bitfloor again" in found.reason


def test_a_library_without_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", saying(native.ABI))
    found = native.load(placed(tmp_path))
    assert found.library is None and "bitfloor_fake_quantize" in found.reason


def test_the_number_is_that_of_the_source() -> None:
    source = Path(__file__).resolve().parents[3] / "csrc" / "common.h"
    assert f"static const int64_t ABI = {native.ABI};" in source.read_text("utf-8")


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SETTING, "reference")
    assert native.loaded() == native.Loaded(None, "BITFLOOR_KERNELS=reference is set")
    assert environment()["kernels"]["quantization (C++)"] == (
        "not used: BITFLOOR_KERNELS=reference is set; torch computes the same values, more slowly"
    )
    monkeypatch.setenv(native.SETTING, "fast")
    with pytest.raises(InputError, match="BITFLOOR_KERNELS=fast is not known; set it to reference, or not at all"):
        native.loaded()


def test_the_environment_says_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.SETTING, raising=False)
    said = environment()["kernels"]["quantization (C++)"]
    reason = native.load(native.FOLDER).reason
    assert said == "active" if not reason else said.startswith(f"not used: {reason}")


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_rows_are_shared_once_each(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WORK_PER_THREAD", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen: list[tuple[int, int]] = []
    native.over_rows(lambda *ends: seen.append(ends), 7, 70)
    assert sorted(row for ends in seen for row in range(*ends)) == list(range(7))
    assert len(seen) == min(threads, 7)
    native.over_rows(lambda *ends: seen.append(ends), 0, 0)
    assert seen[-1] == (0, 0)


def test_an_error_in_a_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WORK_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def fails(first: int, last: int) -> None:
        if first:
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        native.over_rows(fails, 4, 16)

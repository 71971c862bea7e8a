"""When the packed kernels of GPUs are used, and what is said when they are not."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from bitfloor.environment import _gpu, environment
from bitfloor.ops import packed_triton
from bitfloor.ops.packed_triton import Loaded


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    for kept in (packed_triton.load, packed_triton._say):
        kept.cache_clear()
    yield
    for kept in (packed_triton.load, packed_triton._say):
        kept.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Torch says that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 0))
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setitem(sys.modules, "bitfloor.ops.triton.packed", type(sys)("stand-in"))
    sys.modules["bitfloor.ops.triton.packed"].PackedTriton = object  # type: ignore[attr-defined]
    return monkeypatch


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert packed_triton.load() == Loaded(None, "torch finds no GPU")
    assert environment()["kernels"]["gpu (Triton)"] == (
        "not used: torch finds no GPU; on a GPU torch computes from packed weights panel by panel"
    )


def test_what_stands_in_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="not used on the GPU: torch finds no GPU"):
        assert packed_triton.library() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed_triton.library() is None


def test_other_makers_and_old_gpus(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: (9 - 2 * index, 5))
    assert packed_triton.load().reason == "they need compute capability 8.0, and a GPU here has 7.5"
    packed_triton.load.cache_clear()
    gpu.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in packed_triton.load().reason


def test_no_triton(gpu: pytest.MonkeyPatch) -> None:
    gpu.setitem(sys.modules, "bitfloor.ops.triton.packed", None)
    assert "Triton cannot be imported" in packed_triton.load().reason


def test_kernels_that_fail_or_are_wrong_are_not_used(gpu: pytest.MonkeyPatch) -> None:
    def failing(library: object) -> None:
        raise RuntimeError("no such instruction\nand much more")

    gpu.setattr(packed_triton, "_tried", failing)
    found = packed_triton.load()
    assert found.library is None and found.reason == "Triton cannot run them here (RuntimeError: no such instruction)"
    for answer in (torch.tensor([1.0, 2.1]), torch.tensor([1.0, float("nan")])):
        packed_triton.load.cache_clear()
        gpu.setattr(packed_triton, "_tried", lambda library, own=answer: (own, torch.tensor([1.0, 2.0])))
        assert "wrong" in packed_triton.load().reason


def test_kernels_that_are_right_are_used(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(packed_triton, "_tried", lambda library: (torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.0])))
    assert packed_triton.load().library is not None
    assert _gpu() == "active"

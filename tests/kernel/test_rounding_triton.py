"""Triton's passes of learned rounding against their definition: on a GPU if there is one, else by its interpreter."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from kernel.test_rounding import GRIDS, grid, matrices

from bitfloor.ops import native, rounding, rounding_reference

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 128, 64), (4, 150, 64), (7, 33, 16), (2, 10, 1), (1, 300, 300), (9, 1, 64), (3, 40, 7)]


@pytest.fixture(scope="module")
def library() -> Any:
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton kernels run on a GPU, or with TRITON_INTERPRET=1")
    return importlib.import_module("bitfloor.ops.triton.rounding").TritonLibrary()


def on_device(*tensors: Any) -> list[Any]:
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


# Triton's interpreter computes with numpy, which warns where w / s is infinite.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_forward_codes_and_step_are_the_references(library: Any, bits: int) -> None:
    for at, (rows, columns, size) in enumerate(SHAPES):
        kind, shifted = GRIDS[at % len(GRIDS)], bool((at + bits) % 3)
        weight, shift, grad = matrices(rows, columns, bits)
        scale, zero = grid(kind, rows, -(-columns // size), bits, bits)
        given = (weight, shift if shifted else None, scale, zero)
        here, there = torch.full_like(weight, torch.nan), torch.full_like(weight, torch.nan)
        out = here.to(DEVICE)
        library.fake_quantize(*on_device(*given), bits, size, out)
        rounding_reference.fake_quantize(*given, bits, size, there)
        where = f"{(rows, columns, size)} {kind} {shifted}"
        assert torch.equal(out.cpu(), there), where
        codes = torch.full_like(weight, 255, dtype=torch.uint8)
        expected, found = codes.clone(), codes.to(DEVICE)
        library.codes(*on_device(*given), bits, size, found)
        rounding_reference.codes(*given, bits, size, expected)
        assert torch.equal(found.cpu(), expected), where
        moved = on_device(shift.clone() if shifted else None)[0]
        tensors = on_device(weight, scale, zero, grad)
        sums = library.sign_step(tensors[0], moved, *tensors[1:3], tensors[3], 0.013, bits, size)
        other = shift.clone() if shifted else None
        wanted = rounding_reference.sign_step(weight, other, scale, zero, grad, 0.013, bits, size)
        for one, two in zip(sums, wanted, strict=True):
            # Sums in another order: what matters is their sign and size.
            room = 1e-5 * float(two.abs().max()) + 1e-30
            torch.testing.assert_close(one.cpu(), two, rtol=1e-4, atol=room, msg=lambda text, w=where: f"{w}: {text}")
        if moved is not None:
            assert torch.equal(moved.cpu(), other), where


def test_empty_matrices_and_ties(library: Any) -> None:
    empty, nothing = torch.empty(0, 64, device=DEVICE), torch.empty(0, 1, device=DEVICE)
    library.fake_quantize(empty, None, nothing, nothing, 4, 64, empty.clone())
    weight = torch.arange(-4.0, 12.0, 0.5, device=DEVICE).reshape(1, -1)
    ones, out = torch.ones(1, 1, device=DEVICE), torch.empty_like(weight)
    library.fake_quantize(weight, None, ones, 0 * ones, 3, 32, out)
    assert torch.equal(out, weight.round().clamp(0, 7))


def test_only_tensors_on_a_gpu_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.rounding_for(torch.ones(2, 2)) is native.library_for(torch.ones(2, 2))
    if DEVICE == "cuda":
        tensor = torch.ones(2, 2, device=DEVICE)
        assert type(native.rounding_for(tensor)).__name__ == "TritonLibrary"
        monkeypatch.setenv(native.SETTING, native.REFERENCE)
        assert native.rounding_for(tensor) is None
        assert rounding.fake_quantize(tensor, None, tensor, tensor, 2, 1).device.type == "cuda"

"""The operators as torch sees them: schemas, shapes, gradients, what they refuse, and who computes."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_cases import matrix, stored
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.packed import dequantize
from bitfloor.environment import environment
from bitfloor.ops import backend, packed, packed_native
from bitfloor.ops.backend import FLOAT, INT8, activations, int8, reference
from bitfloor.ops.form import read_form

OPS = torch.ops.bitfloor
SPLIT = ((40, 2), (30, 3))


def given(**changes: Any) -> tuple[list[Tensor], list[int]]:
    return stored(matrix(20, SPLIT, **{"order": 1, "rotation": 16, "channel_scale": True, "channels": True, **changes}))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mode", [FLOAT, INT8])
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("grad", [False, True])
def test_torch_finds_nothing_wrong_with_the_product(mode: str, rows: int, grad: bool) -> None:
    parts, form = given()
    x, bias = normal(rows, 70).requires_grad_(grad), normal(20).requires_grad_(grad)
    torch.library.opcheck(OPS.packed_linear, (x, parts, bias, form, mode))


def test_torch_finds_nothing_wrong_with_the_others() -> None:
    parts, form = given()
    ids = torch.tensor([[0, 19], [3, 3]])
    torch.library.opcheck(OPS.packed_embedding, (ids, parts, form, torch.bfloat16))
    torch.library.opcheck(OPS.packed_input, (normal(3, 70), parts, form))
    inner = OPS.packed_input(normal(3, 70), parts, form)
    torch.library.opcheck(OPS.packed_product, (inner, parts, None, form, FLOAT))
    torch.library.opcheck(OPS.packed_gradient, (normal(3, 20), parts, form))


def test_shapes_are_known_without_computing() -> None:
    parts, form = given()
    with FakeTensorMode() as mode:
        moved = [mode.from_tensor(part) for part in parts]
        x = torch.empty(2, 5, 70, dtype=torch.bfloat16)
        assert packed.linear(x, moved, None, form, FLOAT).shape == (2, 5, 20)
        assert packed.linear(x, moved, None, form, FLOAT).dtype == torch.bfloat16
        assert OPS.packed_input(x, moved, form).shape == (2, 5, 96)
        ids = torch.zeros(4, 3, dtype=torch.int64)
        found = packed.embedding(ids, moved, form, torch.float16)
        assert found.shape == (4, 3, 70) and found.dtype == torch.float16


def test_empty_inputs() -> None:
    parts, form = given()
    assert packed.linear(torch.empty(0, 70), parts, None, form, FLOAT).shape == (0, 20)
    assert packed.linear(torch.empty(2, 0, 70), parts, None, form, INT8).shape == (2, 0, 20)
    assert packed.embedding(torch.empty(2, 0, dtype=torch.int64), parts, form, torch.float32).shape == (2, 0, 70)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kernels", [False, True])
def test_gradients_are_those_of_the_dense_product(rows: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, form = given()
    if not kernels:
        monkeypatch.setattr(backend, "of_process", lambda: "reference")
    x, bias, weigh = normal(rows, 70), normal(20), normal(rows, 20)
    found, wanted = [], []
    dense = dequantize(read_form(tuple(form)).weight(parts))
    for kept, product in ((found, lambda x, b: packed.linear(x, parts, b, form, FLOAT)), (wanted, None)):
        own, shift = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = product(own, shift) if product else torch.nn.functional.linear(own, dense, shift)
        (y * weigh).sum().backward()
        kept += [y.detach(), own.grad, shift.grad]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 20])
def test_autocast_changes_nothing(rows: int) -> None:
    parts, form = given()
    x = normal(rows, 70)
    plain = packed.linear(x, parts, None, form, FLOAT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(packed.linear(x, parts, None, form, FLOAT), plain)
        with reference():
            torch.testing.assert_close(packed.linear(x, parts, None, form, FLOAT), plain, rtol=1e-4, atol=1e-4)


def test_the_shared_input_side_refuses_training() -> None:
    parts, form = given()
    inner = OPS.packed_input(normal(3, 70).requires_grad_(), parts, form)
    with pytest.raises(BitfloorError, match="packed_linear has a gradient, once"):
        inner.sum().backward()


def replaced(parts: list[Tensor], index: int, part: Tensor) -> list[Tensor]:
    return [*parts[:index], part, *parts[index + 1 :]]


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    parts, form = given()
    x = normal(2, 70)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        (
            r"the input is torch.float32 \[2, 69\] and must be floating point \[\.\.\., 70\]",
            (x[:, 1:], parts, None, form),
        ),
        (r"the input is torch.int64", (x.long(), parts, None, form)),
        (r"5 parts were given, and the form of the matrix has codes, scale", (x, parts[:5], None, form)),
        (r"codes is torch.uint8 \[2, 63\] and must be", (x, replaced(parts, 0, parts[0][:, :63]), None, form)),
        (r"scale is torch.float32", (x, replaced(parts, 1, parts[1].float()), None, form)),
        (r"the bias is \[19\]", (x, parts, normal(19), form)),
        (r"a form has 7 numbers and 6 for every segment, and 18 were given", (x, parts, None, form[:-1])),
        (r"a form with rotation = 3 has no meaning", (x, parts, None, [*form[:4], 3, *form[5:]])),
        (r"segment 0 of a form", (x, parts, None, [*form[:8], 7, *form[9:]])),
        (r"a form stores 70 columns of 71", (x, parts, None, [20, 71, 0, 0, *form[4:]])),
    ]
    for message, arguments in calls:
        with pytest.raises(InputError, match=message):
            packed.linear(*arguments, FLOAT)
    with pytest.raises(InputError, match="activations = 'int4' is not known; use one of float, int8"):
        packed.linear(x, parts, None, form, "int4")
    with pytest.raises(InputError, match="row numbers are torch.float32; give int64 or int32"):
        packed.embedding(x, parts, form, torch.float32)
    if packed_native.load().library is not None:
        for row in (-1, 20):
            with pytest.raises(IndexError, match="a row was asked for that the packed matrix does not have"):
                packed.embedding(torch.tensor([3, row]), parts, form, torch.float32)


def test_an_order_that_names_no_channel_is_refused() -> None:
    if packed_native.load().library is None:
        pytest.skip("the packed kernels were not built")
    parts, form = given(channels=False)
    parts[-1] = torch.full_like(parts[-1], 255)
    for call in (
        lambda: packed.linear(normal(1, 70), parts, None, form, FLOAT),
        lambda: packed.embedding(torch.tensor([1]), parts, form, torch.float32),
    ):
        with pytest.raises(BitfloorError, match="its order names channels that it does not have"):
            call()


def test_the_backend_is_that_of_the_context_then_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "of_process", backend.of_process.__wrapped__)  # asks every time
    monkeypatch.delenv(backend.SETTING, raising=False)
    assert (backend.backend(), activations()) == ("auto", FLOAT)
    with int8():
        assert (backend.backend(), activations()) == ("int8", INT8)
        with reference():
            assert (backend.backend(), activations()) == ("reference", FLOAT)
        assert backend.backend() == "int8"
    monkeypatch.setenv(backend.SETTING, "int8")
    assert activations() == INT8
    monkeypatch.setenv(backend.SETTING, "fast")
    with pytest.raises(InputError, match="BITFLOOR_BACKEND=fast is not known; set it to one of auto, reference, int8"):
        backend.backend()


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = packed_native.load().library
    if library is None:
        pytest.skip("the packed kernels were not built")
    monkeypatch.setenv(packed_native.CPU, "mmx")
    with pytest.raises(InputError, match="BITFLOOR_CPU=mmx is not known; set it to one of portable, avx2, avx512"):
        packed_native.load.__wrapped__(packed_native.FOLDER)
    monkeypatch.setenv(packed_native.CPU, "portable")
    held = packed_native.load.__wrapped__(packed_native.FOLDER).library
    assert held.level == 0 and held.best == library.best


def test_why_there_are_no_kernels_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it was not built" in packed_native.load(tmp_path).reason
    for name, content in (("damaged", b"not a library"), ("other", b"")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"_packed{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    assert "it cannot be loaded (_packed" in packed_native.load(tmp_path / "damaged").reason
    other = SimpleNamespace(bitfloor_packed_abi=lambda: packed_native.ABI + 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: other)
    assert "it was built from another version" in packed_native.load(tmp_path / "other").reason


def test_without_kernels_the_definition_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, form = given()
    x = normal(2, 70)
    with reference():
        wanted = packed.linear(x, parts, None, form, FLOAT)
    monkeypatch.setattr(packed_native, "load", lambda: packed_native.Loaded(None, "it was not built"))
    assert torch.equal(packed.linear(x, parts, None, form, FLOAT), wanted)
    assert environment()["kernels"]["cpu (C++)"].startswith("not used: it was not built; torch computes")


def test_the_environment_names_the_instruction_set() -> None:
    library = packed_native.load().library
    if library is None:
        pytest.skip("the packed kernels were not built")
    assert environment()["kernels"]["cpu (C++)"] == f"active: {library.best}"


def test_the_number_is_that_of_the_source() -> None:
    source = Path(__file__).resolve().parents[3] / "csrc" / "packed" / "interface.cpp"
    assert f"static const int64_t PACKED_ABI = {packed_native.ABI};" in source.read_text("utf-8")

"""What was asked for is what computes, or a sentence says why not."""

from __future__ import annotations

import pytest
import torch

from bitfloor.core.errors import InputError
from bitfloor.ops import backend, choice, packed_native, packed_triton
from bitfloor.ops.packed_native import Loaded


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def says(name: str) -> None:
        monkeypatch.setattr(backend, "of_process", lambda: name)

    return says


@pytest.mark.parametrize(
    ("said", "name", "activations", "computes"),
    [
        ("auto", "auto", None, "auto"),
        ("int8", "auto", None, "int8"),
        ("reference", "auto", None, "reference"),
        ("auto", "auto", "int8", "int8"),
        ("int8", "auto", "float", "auto"),
        ("reference", "auto", "float", "reference"),
        ("int8", "reference", None, "reference"),
        ("reference", "cpu", None, "auto"),
        ("auto", "cpu", "int8", "int8"),
    ],
)
def test_the_option_goes_before_the_environment(environment, said, name, activations, computes, monkeypatch) -> None:
    environment(said)
    monkeypatch.setattr(packed_native, "load", lambda: Loaded(None, ""))
    with choice.computing(name, activations)():
        assert backend.backend() == computes
    assert backend.backend() == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpu",), "backend 'gpu' is unknown; use one of auto, reference, cpu, triton"),
        (("auto", "int4"), "activations 'int4' are not known; use one of float, int8"),
        (("reference", "int8"), "the backend reference computes with float"),
        (("cpu", None, "cuda"), "computes on the CPU and the device is cuda"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choice.computing(*arguments)


def test_int8_needs_another_backend_than_the_environment_s(environment) -> None:
    environment("reference")
    with pytest.raises(InputError, match="BITFLOOR_BACKEND=reference computes with float"):
        choice.computing("auto", "int8")


def test_kernels_that_were_not_built_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_native, "load", lambda: Loaded(None, "it was not built"))
    with pytest.raises(InputError, match="the backend cpu is not there: it was not built"):
        choice.computing("cpu")
    assert not choice.multiplies_packed("cpu")


def test_triton_needs_a_gpu_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a GPU and torch sees none"):
        choice.computing("triton", None, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="computes on a GPU and the device is cpu"):
        choice.computing("triton")
    monkeypatch.setattr(packed_triton, "load", lambda: packed_triton.Loaded(None, "Triton cannot be imported"))
    with pytest.raises(InputError, match="the backend triton is not there: Triton cannot be imported"):
        choice.computing("triton", None, "cuda")
    assert not choice.multiplies_packed("cuda")
    monkeypatch.setattr(packed_triton, "load", lambda: packed_triton.Loaded(object()))
    choice.computing("triton", None, "cuda")
    assert choice.multiplies_packed("cuda")

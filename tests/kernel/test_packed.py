"""The packed kernels against their definition in torch, in every instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from packed_cases import matrix, stored
from torch import Tensor

from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.ops import backend, packed, packed_native, packed_reference
from bitfloor.ops.backend import FLOAT, INT8, reference
from bitfloor.ops.form import read_form
from bitfloor.ops.packed_native import LEVELS, PackedLibrary

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
SMOLLM = ((576, 576), (192, 576), (1536, 576), (576, 1536))
ODD = ((33, 70), (17, 5), (1, 1), (16, 32))
TIGHT = 3e-6  # of the largest output
MIXED = ((100, 1), (200, 2), (276, 3))


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    found = packed_native.load()
    if found.library is None:
        pytest.skip(f"the packed kernels are not used: {found.reason}")
    if LEVELS.index(request.param) > LEVELS.index(found.library.best):
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(found.library, "level", LEVELS.index(request.param))
    yield request.param


def given() -> PackedLibrary:
    library = packed_native.load().library
    if library is None:
        pytest.skip("the packed kernels were not built")
    return library


def inputs(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Activations as they are: some channels are much louder than the rest."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, ::97] *= 20
    return x


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a part of the largest value; infinite where one of them is no number."""
    assert found.shape == wanted.shape
    difference = (found.double() - wanted.double()).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def exactly(weight: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64: nothing of the operators is in it."""
    y = x.double() @ dequantize(weight).double().T
    return y if bias is None else y + bias.double()


def check(weight: PackedWeight, rows: int = 1, tight: float = TIGHT) -> None:
    """Both products against their definitions, and the rounded one loosely against the exact one."""
    parts, form = stored(weight)
    x = inputs(rows, weight.shape[1])
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(5))
    wanted = exactly(weight, x, bias)
    assert off(packed.linear(x, parts, bias, form, FLOAT), wanted) < tight
    rounded = packed_reference.linear(x, parts, bias, read_form(tuple(form)), INT8)
    found = packed.linear(x, parts, bias, form, INT8)
    assert off(found, rounded) < tight
    assert off(found, wanted) < 0.05


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [*SMOLLM, *ODD], ids=str)
def test_every_width_shape_and_group(bits: int, shape: tuple[int, int], level: str) -> None:
    for number, group_size in enumerate((32, 64, 128, 0)):
        zero = ("packed", "offset", "packed", 3)[(number + bits) % 4]
        check(matrix(shape[0], [(shape[1], bits)], group_size=group_size, zero=zero, seed=bits), rows=1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [7, 16, 32, 96, 0])
def test_every_zero_and_uneven_groups(bits: int, group_size: int, level: str) -> None:
    for zero in ("packed", "centre", "offset", 0, 3, -2, 200):
        check(matrix(33, [(150, bits)], group_size=group_size, zero=zero, seed=bits), rows=3, tight=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [0, 1, 32])
@pytest.mark.parametrize("rotation", [0, 2, 64, 1024])
@pytest.mark.parametrize("channels", [False, True])
def test_mixed_widths_orders_and_rotations(
    dtype: torch.dtype, order: int, rotation: int, channels: bool, level: str
) -> None:
    more: dict[str, Any] = {"channel_scale": rotation != 2, "order": order, "rotation": rotation, "channels": channels}
    check(matrix(40, MIXED, group_size=32, dtype=dtype, **more), rows=2, tight=1e-5)


@pytest.mark.parametrize("rows", range(1, 9))
def test_a_row_does_not_depend_on_the_others(rows: int, level: str) -> None:
    for activations in (FLOAT, INT8):
        parts, form = stored(matrix(72, [(2100, 1), (300, 4)], group_size=128))
        x = inputs(8, 2400)
        whole = packed.linear(x, parts, None, form, activations)
        assert torch.equal(packed.linear(x[:rows], parts, None, form, activations), whole[:rows])


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_no_value_depends_on_threads(threads: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, form = stored(matrix(1000, [(1100, 3)], group_size=64))
    x, ids = inputs(2, 1100), torch.arange(0, 1000, 3)
    library, known = given(), read_form(tuple(form))

    def results() -> list[Tensor]:
        products = [packed.linear(x, parts, None, form, how) for how in (FLOAT, INT8)]
        return [*products, library.rows(parts, known, ids=ids), library.rows(parts, known, first=5, count=700)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = results()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(results(), alone, strict=True))


def test_calls_from_several_threads_do_not_disturb_each_other(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    given_parts = [stored(matrix(900, [(1100, bits)], group_size=64, seed=bits)) for bits in (2, 3, 4)]
    x = inputs(1, 1100)

    def work(index: int) -> Tensor:
        parts, form = given_parts[index % 3]
        return packed.linear(x, parts, None, form, (FLOAT, INT8)[index % 2])

    wanted = [work(index) for index in range(6)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, range(240)))
    assert all(torch.equal(y, wanted[index % 6]) for index, y in enumerate(found))


@pytest.mark.parametrize("bits", WIDTHS)
def test_loudest_inputs_and_largest_codes_do_not_overflow(bits: int, level: str) -> None:
    weight = matrix(16, [(256, bits)], group_size=128, zero=0)
    parts, form = stored(weight)
    parts[0].fill_(255)
    top = float(2**bits - 1)
    for x in (torch.full((1, 256), 127.0), torch.full((1, 256), -127.0)):
        wanted = x.sum() * top * parts[1][0].float().mean(0)
        for activations in (FLOAT, INT8):
            assert off(packed.linear(x, parts, None, form, activations)[0], wanted) < TIGHT


def test_small_scales_and_silent_inputs(level: str) -> None:
    weight = matrix(20, [(128, 2)], group_size=64)
    parts, form = stored(weight)
    parts[1].mul_(1e-6)  # below the smallest normal float16
    x = inputs(1, 128)
    x[:, :64] = 0
    dense = read_form(tuple(form)).weight(parts)
    for activations in (FLOAT, INT8):
        assert off(packed.linear(x, parts, None, form, activations), exactly(dense, x)) < 0.05
        assert not packed.linear(torch.zeros(1, 128), parts, None, form, activations).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(value: float, level: str) -> None:
    parts, form = stored(matrix(20, [(128, 2)], group_size=64))
    x = inputs(2, 128)
    x[0, 100] = value
    for activations in (FLOAT, INT8):
        y = packed.linear(x, parts, None, form, activations)
        assert not y[0].isfinite().any() and y[1].isfinite().all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("order", [0, 1, 32])
@pytest.mark.parametrize("zero", ["packed", "centre", "offset", -300])
def test_dense_rows_have_the_bits_of_the_definition(bits: int, order: int, zero: str | int, level: str) -> None:
    weight = matrix(50, [(90, bits), (70, 4)], group_size=24, zero=zero, order=order, channel_scale=order == 1)
    parts, form = stored(weight)
    dense, known = dequantize(weight), read_form(tuple(form))
    ids = torch.tensor([[49, 0, 16], [17, 17, 31]])
    assert torch.equal(packed.embedding(ids, parts, form, torch.float32), dense[ids])
    assert torch.equal(packed.embedding(ids.int(), parts, form, torch.bfloat16), dense.bfloat16()[ids])
    assert torch.equal(given().rows(parts, known, first=3, count=40), dense[3:43])


def test_rows_of_a_rotated_matrix(level: str) -> None:
    weight = matrix(50, [(160, 4)], rotation=64, channels=True)
    parts, form = stored(weight)
    ids = torch.tensor([3, 49])
    torch.testing.assert_close(packed.embedding(ids, parts, form, torch.float32), dequantize(weight)[ids])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 20])
def test_other_types_of_inputs(dtype: torch.dtype, rows: int, level: str) -> None:
    weight = matrix(40, [(96, 3)], rotation=32)
    parts, form = stored(weight)
    x = inputs(rows, 96).to(dtype)
    y = packed.linear(x, parts, None, form, FLOAT)
    assert y.dtype == dtype
    assert off(y, exactly(weight, x)) < {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: TIGHT}[dtype]


@pytest.mark.parametrize("rows", [9, 40])
def test_many_rows(rows: int, level: str) -> None:
    weight = matrix(1000, [(300, 3), (276, 2)], rotation=64, order=1)
    parts, form = stored(weight)
    x = inputs(rows, 576)
    known = read_form(tuple(form))
    assert torch.equal(
        packed.linear(x, parts, None, form, FLOAT), packed_reference.linear(x, parts, None, known, FLOAT)
    )
    found = packed.linear(x, parts, None, form, INT8)
    assert off(found, packed_reference.linear(x, parts, None, known, INT8)) < TIGHT


def test_the_input_side_can_be_shared(level: str) -> None:
    more: dict[str, Any] = {"order": 1, "rotation": 64, "channels": True}
    weight = matrix(40, MIXED, **more)
    parts, form = stored(weight)
    x = inputs(3, 576)
    once = torch.ops.bitfloor.packed_input(x, parts, form)
    assert off(once, packed_reference.stored_input(x, parts, read_form(tuple(form)))) < 1e-6
    for activations in (FLOAT, INT8):
        y = torch.ops.bitfloor.packed_product(once, parts, None, form, activations)
        assert torch.equal(y, packed.linear(x, parts, None, form, activations))


def test_parts_need_no_alignment(level: str) -> None:
    weight = matrix(33, [(70, 3), (58, 1)], group_size=32)
    parts, form = stored(weight)
    x = inputs(2, 128)
    for shift in (1, 3, 17):
        moved = []
        for part in parts:
            raw = torch.empty(part.numel() * part.element_size() + 64, dtype=torch.uint8)
            at = shift if part.element_size() == 1 else 2 * shift
            place = raw[at : at + part.numel() * part.element_size()].view(part.dtype).view(part.shape)
            moved.append(place.copy_(part))
        for activations in (FLOAT, INT8):
            y = packed.linear(x, moved, None, form, activations)
            assert torch.equal(y, packed.linear(x, parts, None, form, activations))


def test_a_child_of_fork_makes_its_own_threads() -> None:
    given()
    code = (
        "import os, torch\n"
        "from packed_cases import matrix, stored\n"
        "from bitfloor.ops import packed\n"
        "torch.set_num_threads(2)\n"
        "parts, form = stored(matrix(1000, [(1100, 3)]))\n"
        "x = torch.ones(1, 1100)\n"
        "y = packed.linear(x, parts, None, form, 'float')\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if torch.equal(packed.linear(x, parts, None, form, 'float'), y) else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=120
    )
    assert done.returncode == 0


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, form = stored(matrix(20, [(64, 2)]))
    x = inputs(1, 64)
    monkeypatch.setattr(PackedLibrary, "linear", None)  # whatever calls it fails
    with reference():
        inside = packed.linear(x, parts, None, form, FLOAT)
    monkeypatch.setattr(backend, "of_process", lambda: "reference")
    assert torch.equal(packed.linear(x, parts, None, form, FLOAT), inside)

"""The packed kernels of GPUs against their definition: on a GPU if there is one, else by Triton's interpreter."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel.interpreted import mend
from packed_cases import matrix, stored
from torch import Tensor

from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.ops import launch, packed, packed_reference, packed_triton
from bitfloor.ops.backend import FLOAT, INT8, reference
from bitfloor.ops.form import Form, read_form

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
ZEROS = ("packed", "offset", "centre", "packed", 3, "offset", "packed")
# Of the largest output. Few rows are multiplied in what is as good as float32, and only sums differ; 1e-3 is promised.
TIGHT = 3e-6
# What one rounding of the result costs, and one of the weights, which both sides do alike; the promise is 1e-3 beyond.
ROUNDED = {torch.float32: TIGHT, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MIXED = ((50, 1), (70, 4), (40, 3))


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton kernels run on a GPU, or with TRITON_INTERPRET=1")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            mend(patch)
            # Spelled out in the interpreter's operations, a product of four bytes takes ten times as long.
            patch.setattr(inside(), "COMPILED", True)
        yield inside("packed").PackedTriton()


def inside(name: str = "launches") -> Any:
    """A module behind the library."""
    return importlib.import_module(f"bitfloor.ops.triton.{name}")


def on_device(weight: PackedWeight) -> tuple[list[Tensor], Form]:
    parts, form = stored(weight)
    return [part.to(DEVICE) for part in parts], read_form(tuple(form))


def inputs(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Activations as they are: some channels are much louder than the rest."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, ::41] *= 20
    return x.to(DEVICE)


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a part of the largest value; infinite where one of them is no number."""
    assert found.shape == wanted.shape
    found, wanted = found.cpu().double(), wanted.cpu().double()
    difference = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def exactly(weight: PackedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64: nothing of the operators is in it."""
    y = x.cpu().double() @ dequantize(weight).double().T
    return y if bias is None else y + bias.cpu().double()


def check(library: Any, weight: PackedWeight, rows: int, dtype: torch.dtype = torch.float32, int8: bool = True) -> None:
    """Products of so many rows of ``x`` against the definition, and against nothing of it."""
    parts, form = on_device(weight)
    x = inputs(rows, weight.shape[1]).to(dtype)
    bias = torch.randn(weight.shape[0], generator=torch.Generator().manual_seed(5)).to(DEVICE)
    found = library.linear(x, parts, bias, form, False)
    assert found.dtype == dtype
    assert off(found, exactly(weight, x, bias)) < ROUNDED[dtype]
    if int8:
        wanted = packed_reference.linear(x, parts, bias, form, INT8)
        # The last bits of a rotation are free, and what lies between two steps of 1/127 may go either way.
        near = 1e-2 if form.rotation else ROUNDED[dtype]
        assert off(library.linear(x, parts, bias, form, True), wanted) < near


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width(bits: int, library: Any) -> None:
    zero = ZEROS[WIDTHS.index(bits)]
    weight = matrix(18, [(45, bits)], group_size=32, zero=zero, seed=bits)
    check(library, weight, 1)
    check(library, weight, 9, int8=False)
    parts, form = on_device(weight)
    dense, ids = dequantize(weight), torch.tensor([[17, 0], [7, 7]], device=DEVICE)
    assert torch.equal(library.embedding(ids, parts, form, torch.float32).cpu(), dense[ids.cpu()])
    for dtype in (torch.float16, torch.bfloat16):
        some = inside().dense(inside("parts").Matrix.of(form, parts), dtype, first=16, count=2)[:, :45]
        assert torch.equal(some.cpu(), dense[16:].to(dtype))


def test_mixed_widths_with_everything_else(library: Any) -> None:
    weight = matrix(20, MIXED, zero="packed", channel_scale=True, order=1, rotation=64, channels=True, group_size=32)
    check(library, weight, 2, torch.float16)
    check(library, weight, 10, torch.float16, int8=False)
    parts, form = on_device(weight)
    x = inputs(2, 160)
    once = library.stored_input(x, parts, form)
    # The rotation is a sum.
    assert off(once, packed_reference.stored_input(x, parts, form)) < TIGHT
    apart = library.product(once, parts, None, form, False)
    assert off(apart, library.linear(x, parts, None, form, False)) < TIGHT
    ids = torch.tensor([19, 3], device=DEVICE)
    assert off(library.embedding(ids, parts, form, torch.float32), dequantize(weight)[ids.cpu()]) < TIGHT
    grad = inputs(3, 20)
    assert off(library.gradient(grad, parts, form), grad.cpu() @ dequantize(weight)) < TIGHT


def test_groups_that_do_not_end_with_tiles(library: Any) -> None:
    weight = matrix(20, [(50, 3), (40, 2)], group_size=24, zero="packed")
    check(library, weight, 1)


def cut_by_hand(form: Form, rows: int, blocks: int, slices: int, warps: int) -> launch.FewRows:
    step = launch.WARP_TILES * warps
    return launch.FewRows(min(rows, 2), blocks, warps, launch.pieces(form, slices, step))


def test_slices_are_summed_in_order_and_rows_do_not_meet(library: Any) -> None:
    weight = matrix(20, [(520, 2)], group_size=64)
    parts, form = on_device(weight)
    own, x = inside("parts").Matrix.of(form, parts), inputs(3, 520)
    cut = cut_by_hand(form, 3, 1, 3, 1)
    assert len(cut.pieces) == 3
    three = inside().few(x, own, None, 3, torch.float32, cut=cut)
    assert off(three, exactly(weight, x)) < TIGHT
    assert torch.equal(inside().few(x, own, None, 3, torch.float32, cut=cut), three)
    alone = cut_by_hand(form, 1, 1, 3, 1)
    assert torch.equal(inside().few(x[1:2].contiguous(), own, None, 3, torch.float32, cut=alone), three[1:2])


def test_without_the_instruction(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, form = on_device(matrix(5, [(40, 5)], group_size=32))
    x = inputs(1, 40)
    with_it = library.linear(x, parts, None, form, False)
    monkeypatch.setattr(inside(), "COMPILED", False)
    assert torch.equal(library.linear(x, parts, None, form, False), with_it)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(value: float, library: Any) -> None:
    parts, form = on_device(matrix(5, [(64, 2)], group_size=32))
    x = inputs(2, 64)
    x[0, 40] = value
    for int8 in (False, True):
        y = library.linear(x, parts, None, form, int8)
        assert not y[0].isfinite().any() and y[1].isfinite().all()


def test_nothing_and_silence(library: Any) -> None:
    parts, form = on_device(matrix(5, [(64, 2)], group_size=32))
    assert library.linear(torch.empty(0, 64, device=DEVICE), parts, None, form, False).shape == (0, 5)
    assert library.embedding(torch.empty(0, dtype=torch.int64, device=DEVICE), parts, form, torch.half).shape == (0, 64)
    assert not library.linear(torch.zeros(1, 64, device=DEVICE), parts, None, form, False).any()


def test_rows_that_are_not_there_have_no_numbers(library: Any) -> None:
    parts, form = on_device(matrix(5, [(64, 2)], group_size=32))
    found = library.embedding(torch.tensor([4, 5, -1], device=DEVICE), parts, form, torch.float32)
    assert found[0].isfinite().all() and not found[1:].isfinite().any()


def test_a_damaged_order_gives_no_numbers(library: Any) -> None:
    weight = matrix(5, [(64, 2)], group_size=32, order=1)
    parts, form = on_device(weight)
    parts[-1][3] = 200
    assert not library.linear(inputs(1, 64), parts, None, form, False).isfinite().any()


def test_parts_that_begin_anywhere(library: Any) -> None:
    parts, form = on_device(matrix(17, [(64, 3)], group_size=32))
    raw = torch.empty(parts[0].numel() + 1, dtype=torch.uint8, device=DEVICE)
    moved = raw[1:].view(parts[0].shape).copy_(parts[0])
    x = inputs(1, 64)
    assert torch.equal(
        library.linear(x, [moved, *parts[1:]], None, form, False), library.linear(x, parts, None, form, False)
    )


@pytest.mark.full
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [7, 32, 96, 0])
def test_every_zero_and_group(bits: int, group_size: int, library: Any) -> None:
    for number, zero in enumerate(("packed", "centre", "offset", 0, 3, -300)):
        weight = matrix(33, [(150, bits)], group_size=group_size, zero=zero, seed=bits)
        check(library, weight, 1 + number % 3)
        parts, form = on_device(weight)
        dense, ids = dequantize(weight), torch.tensor([32, 0, 16], device=DEVICE)
        assert torch.equal(library.embedding(ids, parts, form, torch.float32).cpu(), dense[ids.cpu()])
        assert off(library.gradient(inputs(2, 33), parts, form), inputs(2, 33).cpu() @ dense) < TIGHT


@pytest.mark.full
@pytest.mark.parametrize("shape", [(1, 1), (17, 5), (16, 32), (100, 300)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 20])
def test_every_shape_and_number_of_rows(shape: tuple[int, int], rows: int, library: Any) -> None:
    for at, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        split = [(shape[1], (2, 3, 4)[at])]
        check(library, matrix(shape[0], split, group_size=64, dtype=torch.bfloat16), rows, dtype)


@pytest.mark.full
@pytest.mark.parametrize("order", [0, 1, 48])
@pytest.mark.parametrize(("rotation", "channels"), [(0, False), (0, True), (2, False), (64, True), (1024, True)])
def test_every_order_and_rotation(order: int, rotation: int, channels: bool, library: Any) -> None:
    weight = matrix(
        40, MIXED, group_size=32, channel_scale=rotation != 2, order=order, rotation=rotation, channels=channels
    )
    for rows in (2, 12):
        check(library, weight, rows, int8=rows == 2)
    parts, form = on_device(weight)
    x, grad, ids = inputs(2, 160), inputs(3, 40), torch.tensor([39, 3], device=DEVICE)
    assert off(library.stored_input(x, parts, form), packed_reference.stored_input(x, parts, form)) < TIGHT
    assert off(library.embedding(ids, parts, form, torch.float32), dequantize(weight)[ids.cpu()]) < TIGHT
    assert off(library.gradient(grad, parts, form), grad.cpu() @ dequantize(weight)) < TIGHT


@pytest.mark.full
def test_mixtures_of_all_widths_and_zeros(library: Any) -> None:
    split = [(32 * (1 + bits % 3) + bits, bits) for bits in WIDTHS]
    for zero, group_size in itertools.product(("packed", "offset", "centre"), (32, 0)):
        check(library, matrix(40, split, zero=zero, group_size=group_size), 2)


@pytest.mark.full
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_no_row_depends_on_how_the_work_is_cut_but_in_its_last_bits(blocks: int, warps: int, library: Any) -> None:
    weight = matrix(72, [(900, 3), (300, 1)], group_size=128)
    parts, form = on_device(weight)
    own, x = inside("parts").Matrix.of(form, parts), inputs(2, 1200)
    for slices in (1, 3, 7):
        cut = cut_by_hand(form, 2, blocks, slices, warps)
        found = inside().few(x, own, None, 3, torch.float32, cut=cut)
        assert off(found, exactly(weight, x)) < TIGHT
        assert torch.equal(inside().few(x, own, None, 3, torch.float32, cut=cut), found)


@pytest.mark.full
def test_panels(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside("packed"), "WIDE_ROWS", 10)
    weight = matrix(100, [(300, 3), (276, 2)], rotation=64, order=1)
    parts, form = on_device(weight)
    x = inputs(11, 576)
    found = library.linear(x, parts, None, form, False)
    assert off(found, packed_reference.linear(x, parts, None, form, FLOAT)) < TIGHT


# -- where there is a GPU ---------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU; the kernels' functions are tested above")


@needs_gpu
@pytest.mark.parametrize("name", list(packed.SCHEMAS))
def test_opcheck(name: str) -> None:
    weight = matrix(40, MIXED, order=1, rotation=64, channels=True)
    parts, form = stored(weight)
    parts = [part.cuda() for part in parts]
    x = inputs(2, 160)
    given: dict[str, tuple[Any, ...]] = {
        "packed_linear": (x, parts, None, form, FLOAT),
        "packed_embedding": (torch.tensor([1, 39]).cuda(), parts, form, torch.float16),
        "packed_input": (x, parts, form),
        "packed_product": (torch.ops.bitfloor.packed_input(x, parts, form), parts, None, form, FLOAT),
        "packed_gradient": (inputs(2, 40), parts, form),
    }
    torch.library.opcheck(getattr(torch.ops.bitfloor, name).default, given[name])


@needs_gpu
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_a_graph_gives_the_same_bits(rows: int) -> None:
    weight = matrix(400, [(700, 3), (324, 2)], rotation=64, order=1)
    parts, form = stored(weight)
    parts = [part.cuda() for part in parts]
    x = inputs(rows, 1024).half()
    wanted = packed.linear(x, parts, None, form, FLOAT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed.linear(x, parts, None, form, FLOAT)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)


@needs_gpu
def test_a_row_does_not_depend_on_the_others() -> None:
    parts, form = stored(matrix(4096, [(2100, 2), (300, 4)], group_size=128))
    parts = [part.cuda() for part in parts]
    x = inputs(8, 2400).half()
    whole = packed.linear(x, parts, None, form, FLOAT)
    for rows in range(1, 8):
        assert torch.equal(packed.linear(x[:rows], parts, None, form, FLOAT), whole[:rows])


@needs_gpu
def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, form = stored(matrix(20, [(64, 2)]))
    parts = [part.cuda() for part in parts]
    monkeypatch.setattr(packed_triton, "library", None)  # whatever calls it fails
    with reference():
        assert packed.linear(inputs(1, 64), parts, None, form, FLOAT).isfinite().all()

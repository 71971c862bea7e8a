"""The native kernel of learned rounding against its definition in torch: equal values, sums included."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from torch import Tensor

from bitfloor.ops import native, rounding, rounding_reference
from bitfloor.ops.native import Library

BITS = (2, 3, 4, 8)
# Rows, columns and group size: whole tiles, short last groups, groups of a few columns, whole rows over several tiles.
SHAPES = [
    (5, 128, 64),
    (3, 576, 128),
    (4, 150, 64),
    (7, 33, 16),
    (6, 40, 7),
    (2, 10, 1),
    (1, 1000, 1000),
    (9, 1, 64),
    (1, 1, 1),
    (2, 17, 32),
    (3, 600, 256),
    (2, 777, 300),
]
GRIDS = ("symmetric", "packed", "fractional", "extreme")


@pytest.fixture
def library() -> Library:
    found = native.load(native.FOLDER)
    if found.library is None:
        pytest.skip(f"the native library is not used here: {found.reason}")
    return found.library


def matrices(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with a row of zeros and outliers, shifts, gradients; some of the gradients are zero."""
    generator = torch.Generator().manual_seed(seed)
    weight, shift, grad = (torch.randn(rows, columns, generator=generator) for _ in range(3))
    weight[rows // 2] = 0.0
    weight[0, ::5] *= 1e4
    grad[:, ::3] = 0.0
    return weight, 0.5 * shift, grad


def grid(kind: str, rows: int, groups: int, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scales of both signs and zero-points."""
    generator = torch.Generator().manual_seed(seed + 1)
    top = (1 << bits) - 1
    sign = torch.where(torch.rand(rows, groups, generator=generator) < 0.5, -1.0, 1.0)
    spread = torch.rand(rows, groups, generator=generator)
    scale = (0.02 + spread).half().float()
    if kind == "symmetric":
        return sign * scale, torch.full_like(scale, float(1 << (bits - 1)))
    zero = torch.randint(0, top + 1, (rows, groups), generator=generator).float()
    if kind == "packed":
        return scale, zero
    if kind == "fractional":
        return sign * scale, top * torch.rand(rows, groups, generator=generator)
    # From where w / s is beyond what float32 holds, over the smallest float16, to where everything is code z.
    sizes = torch.tensor([2.0**-126, 1e-38, 1e-30, 1e-8, 2.0**-24, 1e-5, 1.0, 1e4, 6.5e4])
    pick = torch.randint(0, len(sizes), (rows, groups), generator=generator)
    return sign * sizes[pick], zero


def cases(seed: int = 0) -> Iterator[tuple[tuple[int, int, int], str, bool]]:
    for shape in SHAPES:
        for kind in GRIDS:
            for shifted in (True, False):
                yield shape, kind, shifted


@pytest.mark.parametrize("bits", BITS)
def test_forward_and_codes_are_the_references(library: Library, bits: int) -> None:
    for (rows, columns, size), kind, shifted in cases():
        weight, shift, _ = matrices(rows, columns, bits)
        arguments = (weight, shift if shifted else None, *grid(kind, rows, -(-columns // size), bits, bits), bits, size)
        here, there = torch.full_like(weight, torch.nan), torch.full_like(weight, torch.nan)
        library.fake_quantize(*arguments, here)
        rounding_reference.fake_quantize(*arguments, there)
        assert torch.equal(here, there) and bool(there.isfinite().all()), (rows, columns, size, kind)
        codes, expected = (torch.full_like(weight, 255, dtype=torch.uint8) for _ in range(2))
        library.codes(*arguments, codes)
        rounding_reference.codes(*arguments, expected)
        assert torch.equal(codes, expected), (rows, columns, size, kind)


@pytest.mark.parametrize("bits", BITS)
def test_the_step_and_its_sums_are_the_references(library: Library, bits: int) -> None:
    # No tolerance: the order of additions is part of the definition.
    for (rows, columns, size), kind, shifted in cases():
        weight, shift, grad = matrices(rows, columns, bits)
        scale, zero = grid(kind, rows, -(-columns // size), bits, bits)
        here, there = (shift.clone(), shift.clone()) if shifted else (None, None)
        sums = library.sign_step(weight, here, scale, zero, grad, 0.013, bits, size)
        expected = rounding_reference.sign_step(weight, there, scale, zero, grad, 0.013, bits, size)
        for one, other in zip(sums, expected, strict=True):
            assert torch.equal(one, other) and bool(other.isfinite().all()), (rows, columns, size, kind)
        if here is not None and there is not None:
            assert torch.equal(here, there), (rows, columns, size, kind)
            assert not bool(((here - shift).abs() > 0.0131).any())


def test_ties_go_to_the_even_code(library: Library) -> None:
    weight = torch.arange(-4.0, 12.0, 0.5).reshape(1, -1)
    ones, out = torch.ones(1, 1), torch.empty_like(weight)
    library.fake_quantize(weight, None, ones, 0 * ones, 3, 32, out)
    assert torch.equal(out, weight.round().clamp(0, 7))


def test_close_to_ties_every_operation_rounds_once(library: Library) -> None:
    # Halfway between codes the last bit decides. A product and a sum fused into one operation would fail here.
    generator = torch.Generator().manual_seed(0)
    scale, zero = grid("fractional", 64, 8, 4, 0)
    halves = torch.randint(0, 15, (64, 8, 32), generator=generator) + 0.5
    weight = ((halves - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(64, 256)
    for shift in (None, torch.randint(-2, 3, (64, 256), generator=generator) * 2.0**-22):
        here, there = torch.empty_like(weight), torch.empty_like(weight)
        library.fake_quantize(weight, shift, scale, zero, 4, 32, here)
        rounding_reference.fake_quantize(weight, shift, scale, zero, 4, 32, there)
        assert torch.equal(here, there)


def test_threads_change_nothing(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "WORK_PER_THREAD", 1)
    weight, shift, grad = matrices(13, 150, 0)
    scale, zero = grid("fractional", 13, 3, 3, 0)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 20):  # at last more than rows
            torch.set_num_threads(threads)
            moved, out, codes = shift.clone(), torch.empty_like(weight), torch.empty_like(weight, dtype=torch.uint8)
            library.fake_quantize(weight, shift, scale, zero, 3, 64, out)
            library.codes(weight, shift, scale, zero, 3, 64, codes)
            found.append((out, codes, moved, *library.sign_step(weight, moved, scale, zero, grad, 0.1, 3, 64)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_dense_tensors_go_to_the_library_and_others_do_not(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.SETTING, raising=False)
    called: list[str] = []
    for name in ("fake_quantize", "codes", "sign_step"):
        own = getattr(rounding_reference, name)
        monkeypatch.setattr(
            rounding_reference, name, lambda *given, name=name, own=own: (called.append(name), own(*given))[1]
        )
    weight, shift, grad = matrices(8, 64, 0)
    scale, zero = grid("packed", 8, 2, 4, 0)
    dense = rounding.fake_quantize(weight, shift, scale, zero, 4, 32)
    rounding.codes(weight, shift, scale, zero, 4, 32)
    rounding.sign_step(weight, shift.clone(), scale, zero, grad, 0.1, 4, 32)
    assert called == []
    strided = weight.T.contiguous().T
    assert torch.equal(rounding.fake_quantize(strided, shift, scale, zero, 4, 32), dense)
    rounding.codes(strided, shift, scale, zero, 4, 32)
    rounding.sign_step(weight, shift.clone(), scale, zero, grad.T.contiguous().T, 0.1, 4, 32)
    monkeypatch.setenv(native.SETTING, native.REFERENCE)
    rounding.codes(weight, shift, scale, zero, 4, 32)
    assert called == ["fake_quantize", "codes", "sign_step", "codes"]


# -- was it built? ----------------------------------------------------------------------------------------------------


def installs(distribution: Distribution) -> bool:
    """Whether an installed distribution is the package under test (a source tree on the path is none)."""
    if distribution.read_text("RECORD") is None:
        return False
    if Path(str(distribution.locate_file("bitfloor/ops"))).resolve() == native.FOLDER:
        return True
    origin = distribution.read_text("direct_url.json") or ""
    urls = [part for part in origin.split('"') if part.startswith("file://")]
    return any(native.FOLDER.is_relative_to(Path(unquote(urlparse(url).path)).resolve()) for url in urls)


def test_an_installation_with_a_compiler_has_the_library() -> None:
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"no C++ compiler here ({compiler})")
    if not any(installs(found) for found in distributions(name="bitfloor")):
        pytest.skip("bitfloor runs from its source tree; it is not installed")
    reason = native.load(native.FOLDER).reason
    assert not reason, f"{reason}; `pip install -v -e .` shows what the compiler said"

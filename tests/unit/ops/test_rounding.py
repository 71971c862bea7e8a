"""What learned rounding computes: against plain loops where float32 is exact, and its border."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitfloor.core.affine import Grid, decode, encode
from bitfloor.ops import native, rounding, rounding_reference
from bitfloor.ops.rounding_reference import LANES, lane_sum


@pytest.fixture(autouse=True)
def _in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SETTING, native.REFERENCE)


def exact_case(bits: int, size: int, rows: int = 6, columns: int = 21) -> dict[str, Tensor]:
    """Numbers of few binary places, so that float32 makes no error anywhere, in products and sums neither."""
    generator = torch.Generator().manual_seed(bits)
    shape, groups = (rows, columns), (rows, -(-columns // size))

    def whole(low: int, high: int, shape: tuple[int, int]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    return {
        "weight": whole(-40, 41, shape) / 8,
        "shift": whole(-8, 9, shape) / 16,
        "scale": torch.tensor([-1.0, 1.0])[whole(0, 2, groups).long()] * 2.0 ** whole(-2, 2, groups),
        "zero": whole(0, 2 << bits, groups) / 2,
        "grad": whole(-3, 4, shape) / 4,
    }


def by_loops(case: dict[str, Tensor], rate: float, bits: int, size: int, shifted: bool) -> dict[str, Tensor]:
    """The equations, number by number."""
    top = (1 << bits) - 1
    lists: dict[str, Any] = {name: part.tolist() for name, part in case.items()}
    found = {name: torch.zeros_like(case["weight"]) for name in ("fake", "code")}
    found |= {"shift": case["shift"].clone()}
    found |= {name: torch.zeros_like(case["scale"]) for name in ("towards", "clipped")}
    for i, row in enumerate(lists["weight"]):
        for j, w in enumerate(row):
            k = j // size
            s, z, g = lists["scale"][i][k], lists["zero"][i][k], lists["grad"][i][j]
            rounded = round((w + z * s) / s + (lists["shift"][i][j] if shifted else 0.0))  # Python's goes to even too
            code = min(max(rounded, 0), top)
            inside = code == rounded
            found["fake"][i, j], found["code"][i, j] = (code - z) * s, code
            found["towards"][i, k] += g * (code - z - inside * w / s)
            found["clipped"][i, k] += g * (inside - 1)
            found["shift"][i, j] -= rate * inside * ((g > 0) - (g < 0)) * (1 if s > 0 else -1)
    return found


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("size", [1, 4, 21, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_equations_number_by_number(bits: int, size: int, shifted: bool) -> None:
    case = exact_case(bits, size)
    expected = by_loops(case, 0.25, bits, size, shifted)
    weight, shift, scale, zero = case["weight"], case["shift"], case["scale"], case["zero"]
    given = shift if shifted else None
    assert torch.equal(rounding.fake_quantize(weight, given, scale, zero, bits, size), expected["fake"])
    codes = rounding.codes(weight, given, scale, zero, bits, size)
    assert codes.dtype == torch.uint8 and torch.equal(codes.float(), expected["code"])
    towards, clipped = rounding.sign_step(weight, given, scale, zero, case["grad"], 0.25, bits, size)
    assert torch.equal(towards, expected["towards"]) and torch.equal(clipped, expected["clipped"])
    if shifted:
        assert torch.equal(shift, expected["shift"])


def test_without_a_shift_it_is_round_to_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 50, generator=generator)
    scale = (0.1 + torch.rand(9, 4, generator=generator)).half().float()
    zero = torch.randint(0, 8, (9, 4), generator=generator).float()
    grid = Grid(scale, zero, None, torch.full((4,), 3), 16)
    assert torch.equal(rounding.codes(weight, None, scale, zero, 3, 16), encode(weight, grid))
    assert torch.equal(rounding.fake_quantize(weight, None, scale, zero, 3, 16), decode(encode(weight, grid), grid))


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = exact_case(3, 4)
    arguments = (case["weight"], case["shift"], case["scale"], case["zero"], 3, 4)
    whole = rounding.fake_quantize(*arguments), rounding.codes(*arguments)
    sums = rounding.sign_step(case["weight"], None, case["scale"], case["zero"], case["grad"], 0.1, 3, 4)
    monkeypatch.setattr(rounding_reference, "CHUNK", 4 * 21)
    parts = rounding.fake_quantize(*arguments), rounding.codes(*arguments)
    parted = rounding.sign_step(case["weight"], None, case["scale"], case["zero"], case["grad"], 0.1, 3, 4)
    assert all(torch.equal(one, other) for one, other in zip((*whole, *sums), (*parts, *parted), strict=True))


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 100])
def test_sums_have_the_stated_order(columns: int) -> None:
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    lanes = [torch.zeros(3) for _ in range(LANES)]
    for j in range(columns):
        lanes[j % LANES] = lanes[j % LANES] + values[:, j]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    assert torch.equal(lane_sum(values), lanes[0])
    # Every addition rounds by half a unit at most: far within columns units of the sum of magnitudes.
    error = (lane_sum(values).double() - values.double().sum(-1)).abs()
    assert bool((error <= columns * torch.finfo(torch.float32).eps * values.abs().sum(-1)).all())


def test_a_range_of_nothing_gives_finite_sums() -> None:
    weight, grad = torch.tensor([[8.0, -8.0, 0.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    scale, zero = torch.full((1, 1), 2.0**-126), torch.ones(1, 1)  # 8 / s overflows
    towards, clipped = rounding.sign_step(weight, None, scale, zero, grad, 0.1, 2, 3)
    assert float(towards) == 1.0 * (3 - 1) + 2.0 * (0 - 1) and float(clipped) == -3.0


def test_the_result_goes_where_it_is_asked_and_has_no_graph() -> None:
    case = exact_case(4, 4)
    weight = torch.nn.Parameter(case["weight"])
    out = torch.empty_like(case["weight"])
    arguments = (weight, case["shift"].requires_grad_(), case["scale"], case["zero"], 4, 4)
    assert rounding.fake_quantize(*arguments, out=out) is out and not out.requires_grad
    assert torch.equal(rounding.fake_quantize(*arguments), out)
    rounding.sign_step(*arguments[:4], case["grad"], 0.1, 4, 4)


def test_a_matrix_without_rows_or_columns() -> None:
    for rows, columns, groups in ((0, 8, 2), (3, 0, 0)):
        empty, side = torch.empty(rows, columns), torch.empty(rows, groups)
        assert rounding.fake_quantize(empty, empty, side, side, 4, 4).shape == (rows, columns)
        assert rounding.sign_step(empty, empty.clone(), side, side, empty, 0.1, 4, 4)[0].shape == (rows, groups)


WRONG = [
    ({"weight": torch.zeros(24)}, r"the weight has shape \(24,\); a matrix \[O, I\] is needed"),
    ({"weight": torch.zeros(3, 8).double()}, "weight is torch.float64; torch.float32 is needed"),
    ({"shift": torch.zeros(8, 3)}, r"shift has shape \(8, 3\); \(3, 8\) is needed"),
    ({"shift": torch.zeros(3, 8).half()}, "shift is torch.float16"),
    ({"scale": torch.ones(3, 1)}, r"scale has shape \(3, 1\); \(3, 2\) is needed"),
    ({"zero": torch.zeros(3, 2, dtype=torch.int32)}, "zero is torch.int32"),
    ({"zero": torch.zeros(3, 2, device="meta")}, "zero is on meta and the weight on cpu; one device is needed"),
    ({"grad": torch.zeros(3, 8).bfloat16()}, "grad is torch.bfloat16"),
    ({"grad": torch.zeros(3, 7)}, r"grad has shape \(3, 7\)"),
    ({"bits": 0}, "codes of 0 bits"),
    ({"bits": 9}, "codes of 9 bits do not fit a byte; use 1 to 8"),
    ({"group_size": 0}, "a group of 0 columns is no group"),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    good = {"weight": torch.zeros(3, 8), "shift": torch.zeros(3, 8), "scale": torch.ones(3, 2)}
    given: dict[str, Any] = {**good, "zero": torch.zeros(3, 2), "bits": 4, "group_size": 4, **wrong}
    grad = given.pop("grad", torch.zeros(3, 8))
    with pytest.raises(ValueError, match=sentence):
        rounding.sign_step(**given, grad=grad, rate=0.1)
    if "grad" not in wrong:
        for function in (rounding.fake_quantize, rounding.codes):
            with pytest.raises(ValueError, match=sentence):
                function(**given)


def test_a_wrong_target_is_refused() -> None:
    weight, side = torch.zeros(3, 8), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"out has shape \(3, 9\)"):
        rounding.fake_quantize(weight, None, side, side, 4, 4, out=torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"out is torch\.float16"):
        rounding.fake_quantize(weight, None, side, side, 4, 4, out=torch.zeros(3, 8).half())

"""A budget in stored bits a weight, everything counted: promised, kept to, and refused where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.pipeline.choice import brought, budget_bits, mean_width
from bitfloor.pipeline.job import Allocation

Recipe = dict[str, Any]
REF = MatrixRef("block.0.up", "block.0.up.weight", (80, 96), 0, "linear")


def budget(stored: float, **parts: Any) -> dict[str, Any]:
    return {"policy": "budget", "stored": stored, "sequences": 8, **parts}


@pytest.mark.parametrize("sort", [False, True], ids=["natural", "sorted"])
@pytest.mark.parametrize("stored", [2.6, 3.0, 3.75])
def test_what_is_promised_is_kept_and_nearly_used(
    stored: float, sort: bool, trained: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    wanted = recipe("rtn-minmax", 2, 32, allocation=budget(stored, sort=sort))
    planned = api.plan(trained, wanted)
    report = api.quantize(trained, tmp_path / "out", wanted)
    assert planned["bits_per_linear_weight"] == pytest.approx(stored, abs=1e-9)
    assert stored - 0.02 < report["bits_per_linear_weight"] <= stored


@pytest.mark.parametrize("stored", [2.05, 2.31, 3.0, 4.4, 6.9])
def test_the_mean_width_takes_what_is_stored(stored: float) -> None:
    spec, how = QuantSpec(2, 32), Allocation("budget", stored=stored)
    width = mean_width(REF, spec, how)
    assert brought(REF, spec, how) == pytest.approx(stored * 80 * 96)
    assert budget_bits(REF, spec, width) == pytest.approx(stored * 80 * 96)


def test_the_mean_width_has_ends() -> None:
    spec = QuantSpec(2, 32)
    assert mean_width(REF, spec, Allocation("budget", stored=0.5)) == 1
    assert mean_width(REF, spec, Allocation("budget", stored=30.0)) == 8


def test_what_makes_no_sense_is_refused(trained: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="raise allocation.stored, or allow narrower widths"):
        api.quantize(trained, tmp_path / "out", recipe("rtn-minmax", 2, allocation=budget(1.05)))
    with pytest.raises(InputError, match="sets stored and average; a budget has one of them"):
        api.quantize(trained, tmp_path / "out", recipe("rtn-minmax", 2, allocation=budget(2.0, average=2)))
    with pytest.raises(InputError, match="sets stored, which policy sba does not read"):
        allocation = {"policy": "sba", "stored": 2.0}
        api.quantize(trained, tmp_path / "out", recipe("rtn-minmax", 2, allocation=allocation))
    with pytest.raises(InputError, match=r"allocation.stored = 0.5 is not allowed"):
        api.quantize(trained, tmp_path / "out", recipe("rtn-minmax", 2, allocation=budget(0.5)))
    assert not (tmp_path / "out").exists()

"""Plans as files: what is written is read, and what does not fit is refused in a sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitfloor.core.bit_plan import BitPlan, MatrixPlan, read_plan
from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec

REF = MatrixRef("a", "a.weight", (8, 40), 0, "linear")
SPEC = QuantSpec(2, 16)
PLAN = BitPlan("f" * 64, "sba", {"a": MatrixPlan((8, 40), 16, 0, (1, 2, 3), {"promoted": 1})}, {"uniform": False})


def written(tmp_path: Path, **changes: Any) -> Path:
    data = json.loads(json.dumps(PLAN.to_dict()))
    for path, value in changes.items():
        place = data if path in data else data["matrices"]["a"]
        place[path] = value
    (tmp_path / "plan.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path / "plan.json"


def refusal(action: Any) -> str:
    with pytest.raises(InputError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_plan(written(tmp_path)) == PLAN
    assert PLAN.apply({"a": SPEC}, {"a": REF}, "f" * 64)["a"] == replace(SPEC, widths=(1, 2, 3))


def test_its_hash_is_that_of_what_a_replay_takes_from_it() -> None:
    same = replace(PLAN, policy="other", summary={"bits": 2})
    assert same.sha256() == PLAN.sha256()
    other = {"a": replace(PLAN.matrices["a"], widths=(1, 2, 2))}
    assert replace(PLAN, matrices=other).sha256() != PLAN.sha256()
    assert replace(PLAN, model="e" * 64).sha256() != PLAN.sha256()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"widths": [1, 2, 9]}, "width 9 is not one bitfloor stores"),
        ({"widths": [1, 2]}, "2 widths for 40 columns in groups of 16"),
        ({"widths": [1, 2, 3.0]}, "must be whole numbers"),
        ({"widths": 3}, "not a complete bit plan"),
        ({"group_size": 0}, "in groups of 0"),
        ({"shape": [8]}, "must be whole numbers"),
        ({"why": None}, "why must be a mapping"),
        ({"summary": None}, "summary must be a mapping"),
        ({"bitfloor_plan": 2}, "version 2, and this bitfloor reads version 1"),
        ({"matrices": []}, "not a complete bit plan"),
    ],
)
def test_a_wrong_file_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = written(tmp_path, **changes)
    assert says in refusal(lambda: read_plan(path))


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert "cannot read the plan" in refusal(lambda: read_plan(path))
    path.write_text("{", encoding="utf-8")
    assert "is not JSON" in refusal(lambda: read_plan(path))
    for text in ("[]", '{"a": 1}', "3"):
        path.write_text(text, encoding="utf-8")
        assert "is not a bit plan" in refusal(lambda: read_plan(path))


def test_a_plan_fits_one_model_and_one_recipe() -> None:
    refs = {"a": REF, "b": replace(REF, name="b")}
    fit = "f" * 64
    assert "for a model with fingerprint ffffffffffff" in refusal(lambda: PLAN.apply({"a": SPEC}, refs, "e" * 64))
    assert "says nothing of b" in refusal(lambda: PLAN.apply({"a": SPEC, "b": SPEC}, refs, fit))
    assert "has a, which the recipe does not quantize" in refusal(lambda: PLAN.apply({}, refs, fit))
    wide = replace(SPEC, group_size=20)
    assert "group_size 16, and the recipe has 20" in refusal(lambda: PLAN.apply({"a": wide}, refs, fit))
    turned = replace(SPEC, rotation=8)
    assert "rotation 0, and the recipe has 8" in refusal(lambda: PLAN.apply({"a": turned}, refs, fit))
    tall = {"a": replace(REF, shape=(9, 40))}
    assert "shape (8, 40), and the recipe has (9, 40)" in refusal(lambda: PLAN.apply({"a": SPEC}, tall, fit))

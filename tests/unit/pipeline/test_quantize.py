"""What decides the bytes of a result is in its fingerprint; where and how it was made is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import save_pico

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.modeling.loader import open_source
from bitfloor.pipeline import quantize
from bitfloor.pipeline.quantize import make_fingerprint
from bitfloor.recipe.job import make_job
from bitfloor.recipe.load import load_recipe

RECIPE: dict[str, Any] = {"method": {"name": "gptq"}, "spec": {"bits": 3, "group_size": 32}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("fingerprint") / "model")


def fingerprint(folder: Path, data: str = "none", **changes: Any) -> dict[str, Any]:
    source = open_source(folder)
    return make_fingerprint(source, make_job(load_recipe({**RECIPE, **changes}), source), data, "cpu")


def test_its_fields(folder: Path) -> None:
    found = fingerprint(folder, "beef")
    assert set(found) == {
        *("recipe", "model", "calibration_tokens", "products", "device", "processor", "threads"),
        *("bitfloor", "torch", "transformers"),
    }
    assert found["calibration_tokens"] == "beef" and found["device"] == "cpu"
    assert found["products"] == fingerprint(folder, "beef", method={"name": "gptq"})["products"] != "none"
    assert fingerprint(folder, "beef", method={"name": "rtn", "range": "minmax"})["products"] == "none"
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__


def test_names_and_places_do_not_count(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(folder)
    assert fingerprint(tmp_path / "elsewhere", name="another", description="words") == fingerprint(folder)


@pytest.mark.parametrize(
    "changes",
    [{"seed": 3}, {"spec": {"bits": 3, "group_size": 48}}, {"method": {"name": "gptq", "damping": 0.02}}],
    ids=["seed", "group size", "option"],
)
def test_everything_in_the_recipe_counts(folder: Path, changes: dict[str, Any]) -> None:
    found, before = fingerprint(folder, **changes), fingerprint(folder)
    assert {key for key in found if found[key] != before[key]} == {"recipe"}


def test_defaults_written_out_are_the_same_recipe(folder: Path) -> None:
    assert fingerprint(folder, method={"name": "gptq", "damping": 0.01, "act_order": True}) == fingerprint(folder)


def test_the_heap_is_steadied_before_the_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a skeleton makes every weight for a moment; a heap that has grown is searched first ever after."""
    calls: list[str] = []

    def opened(*_: Any, **__: Any) -> Any:
        calls.append("open")
        raise InputError("enough")

    monkeypatch.setattr(api, "steady_allocation", lambda: calls.append("steady"))
    monkeypatch.setattr(api, "open_source", opened)
    with pytest.raises(InputError, match="enough"):
        api.quantize(tmp_path, tmp_path / "out")
    assert calls == ["steady", "open"]


def test_machine_and_versions_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(folder)
    monkeypatch.setattr(quantize, "version", lambda name: f"{name} of the day after")
    monkeypatch.setattr(quantize.platform, "machine", lambda: "abacus")
    after = fingerprint(folder)
    assert {key for key in after if after[key] != before[key]} == {"bitfloor", "transformers", "processor"}

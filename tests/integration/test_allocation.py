"""Widths by group from the recipe to the loaded model: found, stored, replayed, resumed, and refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from allocating import BUDGET, METHODS, SBA, mixed, plan_of, tensors
from integration.test_learned_rounding import hashes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitfloor import api
from bitfloor.cli.main import main
from bitfloor.core.bit_plan import read_plan
from bitfloor.core.errors import InputError
from bitfloor.pipeline.events import Event

IDS = torch.tensor([[1, 5, 9, 20, 31]])


def replays() -> list[Any]:
    """Architecture, policy, sorted or not, method: every method on one architecture, the others where they differ."""
    methods = [*((False, method) for method in METHODS), *((True, METHODS[i]) for i in (0, 3))]
    quick = {("mixtral", "sba", False, "gptq"), ("mixtral", "budget", True, "bitfloor")}
    quick |= {("gpt2", "sba", True, "bitfloor"), ("gpt2", "budget", False, "gptq")}
    found = []
    for name in ("llama", "mixtral", "gpt2"):
        for allocation in (SBA, BUDGET | {"average": 2.5}):
            for sort, method in methods:
                seldom = name != "llama" and (name, allocation["policy"], sort, method["name"]) not in quick
                label = "-".join((name, allocation["policy"], "sorted" if sort else "natural", method["name"]))
                marks = [pytest.mark.full] if seldom else []
                found.append(pytest.param(name, allocation, sort, method, id=label, marks=marks))
    return found


@pytest.mark.parametrize(("name", "allocation", "sort", "method"), replays())
def test_what_is_planned_is_stored_and_a_replay_gives_the_same_bytes(
    name: str,
    allocation: dict[str, Any],
    sort: bool,
    method: dict[str, Any],
    pico: Any,
    small: dict[str, Any],
    tmp_path: Path,
) -> None:
    recipe = mixed(small, allocation | ({"sort": True} if sort else {}), method, rotation=8)
    report = api.quantize(pico(name), tmp_path / "out", recipe)
    plan = plan_of(tmp_path / "out")
    assert report["allocation"]["policy"] == allocation["policy"] == plan["policy"]
    model = api.load(tmp_path / "out", dtype=torch.float32)
    widths = set()
    for module in model.modules():
        layout = getattr(module, "layout", None)
        if layout is not None and layout["kind"] not in ("embedding", "head"):
            widths |= {segment["bits"] for segment in layout["segments"]}
            assert layout.get("channels", False) is sort
    assert widths == {width for matrix in plan["matrices"].values() for width in matrix["widths"]} and len(widths) > 1
    api.export(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-3, atol=1e-3)
    again = recipe | {"allocation": {"plan": str(tmp_path / "out" / "plan.json")}}
    api.quantize(pico(name), tmp_path / "again", again)
    assert tensors(tmp_path / "again") == tensors(tmp_path / "out")
    assert plan_of(tmp_path / "again")["matrices"] == plan["matrices"]


@pytest.mark.parametrize("allocation", [SBA, BUDGET | {"average": 2.5}], ids=lambda part: part["policy"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    allocation: dict[str, Any], pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    if allocation["policy"] == "budget":
        allocation = allocation | {"tables": [4, 8], "sort": True}
    recipe = mixed(small, allocation, METHODS[3]) | {"tune": {"steps": 3}}
    api.quantize(pico("llama"), tmp_path / "whole", recipe)

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.quantize(pico("llama"), tmp_path / "out", recipe, progress=stop)
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_the_promise_is_kept_by_what_pays_more_for_one_bit(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    """SBA keeps the mean width; what is stored is never above what plan says."""
    recipe = mixed(small, SBA, METHODS[1])
    planned = api.plan(pico("llama"), recipe)
    report = api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert report["bits_per_linear_weight"] <= planned["bits_per_linear_weight"]


def test_one_group_a_matrix_has_nothing_to_share(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    api.quantize(pico("llama"), tmp_path / "out", mixed(small, SBA, METHODS[0], group_size=-1))
    assert {tuple(matrix["widths"]) for matrix in plan_of(tmp_path / "out")["matrices"].values()} == {(2,)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spec": {"bits": 1, "group_size": 8}}, "0 bits beside its 1"),
        ({"spec": {"bits": 6, "group_size": 8}}, "7 bits beside its 6"),
        (
            {
                "allocation": {"policy": "budget", "average": 1.0, "widths": [2, 3]},
                "spec": {"bits": 2, "group_size": 32},
            },
            "cannot be met",
        ),
        ({"allocation": {"policy": "budget", "widths": []}}, "allocation.widths = .* is not allowed"),
        ({"allocation": {"policy": "knapsack"}}, "use sba or budget"),
        ({"allocation": {"policy": "sba", "average": 2.5}}, "average, which policy sba does not read"),
        ({"allocation": {"policy": "budget", "uniform": True}}, "uniform, which policy budget does not read"),
        ({"allocation": {"plan": "/nowhere/plan.json"}}, "cannot read the plan"),
        ({"method": {"name": "gptq", "range": "sqc"}, "spec": {"bits": 2, "group_size": 8, "symmetric": True}}, "sqc"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    changes: dict[str, Any], says: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        api.quantize(pico("llama"), tmp_path / "out", mixed(small, SBA, METHODS[0]) | changes)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_edited_plan_is_told_as_what_it_is(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    recipe = mixed(small, BUDGET | {"average": 2.5}, METHODS[1])
    first = api.quantize(pico("llama"), tmp_path / "out", recipe)["allocation"]
    plan = plan_of(tmp_path / "out")
    same = recipe | {"allocation": {"plan": str(tmp_path / "out" / "plan.json")}}
    again = api.quantize(pico("llama"), tmp_path / "same", same)
    assert again["allocation"] == first and first["gap"] >= 0
    name, one = next((n, m) for n, m in plan["matrices"].items() if len(set(m["widths"])) > 1)
    plan["matrices"][name]["widths"] = one["widths"][::-1]  # as large as before
    (tmp_path / "edited.json").write_text(json.dumps(plan), encoding="utf-8")
    other = recipe | {"allocation": {"plan": str(tmp_path / "edited.json")}}
    report = api.quantize(pico("llama"), tmp_path / "other", other)
    told = report["allocation"]
    assert "gap" not in told and told["bits_per_weight"] == pytest.approx(report["bits_per_linear_weight"])
    assert told["policy"] == "budget" and told["sha256"] != first["sha256"]


def test_a_plan_of_another_model_is_refused(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    api.quantize(pico("llama"), tmp_path / "out", mixed(small, SBA, METHODS[1]))
    again = mixed(small, {"plan": str(tmp_path / "out" / "plan.json")}, METHODS[1])
    with pytest.raises(InputError, match="made for a model with fingerprint"):
        api.quantize(pico("llama", num_hidden_layers=2), tmp_path / "other", again)
    again["spec"]["group_size"] = 16
    with pytest.raises(InputError, match="group_size 8, and the recipe has 16"):
        api.quantize(pico("llama"), tmp_path / "other", again)
    assert not (tmp_path / "other").exists()


def test_stored_channels_that_are_no_order_are_refused(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    api.quantize(pico("llama"), tmp_path / "out", mixed(small, SBA | {"sort": True}, METHODS[1]))
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith(".channels"))
    stored[name][0] = stored[name][1]
    save_file(stored, path, metadata={"format": "pt"})
    for use in (lambda: api.load(tmp_path / "out"), lambda: api.export(tmp_path / "out", tmp_path / "dense")):
        with pytest.raises(InputError, match=r"channels is no order|checksum|not as it was"):
            use()


def test_a_bit_plan_alone_is_the_plan_of_the_run(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    recipe = mixed(small, SBA, METHODS[1]) | {"tune": {"steps": 2}}
    made = api.allocate(pico("llama"), tmp_path / "plan.json", recipe)
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert made.matrices == read_plan(tmp_path / "out" / "plan.json").matrices
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]
    for wrong, says in (
        (recipe | {"allocation": None}, "nothing to allocate"),
        (mixed(small, {"plan": str(tmp_path / "plan.json")}, METHODS[1]), "replays a plan"),
    ):
        with pytest.raises(InputError, match=says):
            api.allocate(pico("llama"), tmp_path / "other.json", wrong)
    with pytest.raises(InputError, match="there is no folder"):
        api.allocate(pico("llama"), tmp_path / "nowhere" / "plan.json", recipe)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        api.allocate(pico("llama"), tmp_path / "other.json", recipe)


def test_the_command_that_allocate_names_replays_the_plan(
    pico: Any, texts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--recipe", "slim-llm-w2g64", "--calib", texts.calibration, "spec.group_size=16", "bits=2"]
    options += ["calibration.sequences=4", "calibration.seqlen=32", "calibration.batch_size=2"]
    assert main(["allocate", str(pico("llama")), "--out", str(tmp_path / "my plan.json"), *options]) == 0
    said = capsys.readouterr().err
    words = shlex.split(said[said.index("next: ") :].splitlines()[0].removeprefix("next: bitfloor "))
    words[words.index("DIR")] = str(tmp_path / "out")
    assert main(words) == 0, capsys.readouterr().err
    stored = {read_plan(path).sha256() for path in (tmp_path / "my plan.json", tmp_path / "out" / "plan.json")}
    assert len(stored) == 1

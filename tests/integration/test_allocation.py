"""Widths by group from the recipe to the loaded model: found, stored, replayed, resumed, and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_learned_rounding import hashes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitfloor import api
from bitfloor.calib.block import BlockRunner
from bitfloor.core.affine import decode
from bitfloor.core.bit_plan import read_plan
from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.methods.gptq import Gptq, Shown, solve
from bitfloor.methods.options import GptqConfig
from bitfloor.modeling.loader import open_source
from bitfloor.pipeline.budget import item_of
from bitfloor.pipeline.choice import Item, budget_bits, choose
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.job import Allocation, Job, assign
from bitfloor.pipeline.survey import Stakes, SurveyOptions, survey
from bitfloor.pipeline.survey_ends import Ends, rounded

IDS = torch.tensor([[1, 5, 9, 20, 31]])
SBA = {"policy": "sba"}
BUDGET = {"policy": "budget", "sequences": 3}
METHODS: list[dict[str, Any]] = [
    {"name": "gptq"},
    {"name": "rtn", "range": "minmax"},
    {"name": "signround", "steps": 4},
    {"name": "bitfloor", "steps": 4, "optimizer": "adamw"},
    {"name": "omniquant", "steps": 4},
]


def mixed(small: dict[str, Any], allocation: dict[str, Any], method: dict[str, Any], **spec: Any) -> dict[str, Any]:
    recipe = {**small, "method": method, "allocation": allocation}
    recipe["spec"] = {"bits": 2, "group_size": 8, **spec}
    return recipe


def uniform_item(ref: MatrixRef, spec: QuantSpec, losses: list[float], average: float, widths: list[int]) -> Item:
    """A matrix whose groups all have one of the widths."""
    groups = len(spec.group_widths(ref.shape[1]))
    options = tuple((bits,) * groups for bits in widths)
    return Item(ref, spec, options, torch.tensor(losses, dtype=torch.float64), budget_bits(ref, spec, average))


def plan_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text("utf-8"))
    return found


def tensors(folder: Path) -> dict[str, str]:
    return {name: value for name, value in hashes(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("sort", "method"),
    [*((False, method) for method in METHODS), *((True, METHODS[i]) for i in (0, 3))],
    ids=lambda part: part["name"] if isinstance(part, dict) else "sorted" if part else "natural",
)
@pytest.mark.parametrize("allocation", [SBA, BUDGET | {"average": 2.5}], ids=lambda part: part["policy"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_what_is_planned_is_stored_and_a_replay_gives_the_same_bytes(
    name: str,
    sort: bool,
    allocation: dict[str, Any],
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


@pytest.mark.parametrize("sort", [False, True], ids=["natural", "sorted"])
@pytest.mark.parametrize("average", [1, 1.7, 2, 2.25, 2.5, 3])
def test_a_budget_is_kept(average: float, sort: bool, pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    """The order of channels is paid for from it."""
    if sort and average == 1:
        pytest.skip("nothing narrower is left to pay for the order with")
    recipe = mixed(small, BUDGET | {"average": average, "sort": sort}, METHODS[1], group_size=32)
    planned = api.plan(pico("llama"), recipe)
    report = api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert report["bits_per_linear_weight"] <= planned["bits_per_linear_weight"] + 1e-9
    # Pico matrices are narrow: one group more or less is a good part of a bit.
    assert report["bits_per_linear_weight"] > planned["bits_per_linear_weight"] - 0.2
    assert 0 <= report["allocation"]["gap"] < 1  # most of it is padding, which the bound leaves out


def test_one_budget_a_matrix_keeps_each_to_its_own(pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    recipe = mixed(small, BUDGET | {"scope": "matrix", "average": 3.5}, METHODS[1], bits=3, group_size=8)

    def sizes(**changes: Any) -> dict[str, int]:
        planned = api.plan(pico("llama"), recipe | changes)["matrices"]
        return {matrix["name"]: matrix["bytes"] for matrix in planned}

    narrow, wide = (sizes(allocation=None, spec={"bits": bits, "group_size": 8}) for bits in (3, 4))
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    found = sizes(allocation={"plan": str(tmp_path / "out" / "plan.json")})
    plan = plan_of(tmp_path / "out")["matrices"]
    assert plan and all(2 * found[name] <= narrow[name] + wide[name] for name in plan)
    assert any(len(set(matrix["widths"])) > 1 for matrix in plan.values())


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


def test_the_survey_foretells_what_a_rounded_matrix_costs(trained: Path, texts: Any) -> None:
    """Predicted divergence of GPTQ at 2 and 3 bits, one matrix at a time, against the model's own on other text."""
    source = open_source(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = [
        torch.tensor(tokenizer(Path(text.partition(":")[0]).read_text("utf-8"))["input_ids"][: 16 * 128]).view(16, 128)
        for text in (texts.calibration, texts.evaluation)
    ]
    refs = {ref.name: ref for ref in source.map.matrices}
    specs = dict.fromkeys(refs, QuantSpec(2, 16))
    found: dict[str, list[float]] = {}
    costs: dict[str, list[torch.Tensor]] = {}
    how = GptqConfig(importance=0.5, damping=0.05, static_groups=False)

    def visit(runner: BlockRunner, stakes: Iterator[tuple[str, Stakes]]) -> None:
        for name, own in stakes:
            weight = runner.weight(name).clone()
            item = item_of(refs[name], specs[name], weight, own, Allocation("budget", widths=(2, 3)), how)
            assert len(item.options) > 2 and item.options[:2] == tuple((b,) * len(item.options[0]) for b in (2, 3))
            found[name] = item.losses[:2].tolist()
            seen = Shown(own.hessian, None, own.tokens)
            solved = [solve(weight, seen, replace(specs[name], bits=bits), how)[0] for bits in (2, 3)]
            costs[name] = [decode(each.codes, each.grid) for each in solved]

    survey(source, list(ids[0].split(4)), dict.fromkeys(specs, 0), visit, SurveyOptions())
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    ratios = []
    with torch.no_grad():
        base = model(ids[1]).logits.log_softmax(-1)
        for name, rounded in costs.items():
            module = model.get_submodule(name)
            kept = module.weight.data.clone()
            for predicted, weight in zip(found[name], rounded, strict=True):
                module.weight.data = weight
                logs = model(ids[1]).logits.log_softmax(-1)
                actual = float((base.exp() * (base - logs)).sum(-1).mean())
                ratios.append(predicted / actual)
            module.weight.data = kept
    assert found.keys() == specs.keys()
    middle = sorted(ratios)[len(ratios) // 2]
    assert 0.6 < middle < 1.6, middle
    # Over four decades of divergence, from the query of the last block to the value of the first.
    assert sum(0.33 < ratio < 3 for ratio in ratios) >= 0.85 * len(ratios), sorted(ratios)


def test_what_is_surveyed_does_not_depend_on_how_sequences_are_batched(trained: Path) -> None:
    ids = torch.randint(0, 250, (6, 32), generator=torch.Generator().manual_seed(0))
    seen: list[dict[str, torch.Tensor]] = []
    for batches in ([ids], list(ids.split(2))):
        source, own = open_source(trained), {}

        def visit(_: BlockRunner, stakes: Iterator[tuple[str, Stakes]], own: dict[str, torch.Tensor] = own) -> None:
            own.update({name: stake.rows for name, stake in stakes})

        survey(source, batches, dict.fromkeys([ref.name for ref in source.map.matrices], 16), visit, SurveyOptions())
        seen.append(own)
    assert seen[0].keys() == seen[1].keys() and all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_what_keeps_its_width_pays_from_the_common_budget() -> None:
    refs = {name: MatrixRef(name, name, (64, 128), 0, "linear") for name in "abc"}
    spec, widths, losses = QuantSpec(4, 32), [1, 2, 3, 4, 5], [16.0, 4.0, 1.0, 0.25, 0.06]

    def items(average: float) -> dict[str, Item]:
        found = {
            "a": uniform_item(refs["a"], spec, losses, average, widths),
            "b": uniform_item(refs["b"], spec, [3.0 * loss for loss in losses], average, widths),
        }
        return {**found, "c": uniform_item(refs["c"], spec, [0.0], average, [4])}

    plan = choose("m", Allocation("budget", average=3.7), items(3.7))
    assert set(plan.matrices["c"].widths) == {4}
    assert plan.summary["bits_per_weight"] <= plan.summary["budget_bits_per_weight"]
    assert sum(plan.matrices["b"].widths) > sum(plan.matrices["a"].widths)
    with pytest.raises(InputError, match="too little of the budget"):
        choose("m", Allocation("budget", average=1.7), items(1.7))


def test_a_matrix_that_few_tokens_reached_keeps_its_width() -> None:
    ref, spec = MatrixRef("a", "a", (8, 32), 0, "linear"), QuantSpec(3, 8)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for tokens, many in ((2, False), (4096, True)):
        own = Stakes(torch.ones(8), torch.eye(32), tokens)
        item = item_of(ref, spec, weight, own, Allocation("budget"), GptqConfig())
        assert (len(item.options) > 5) == many and ("note" in item.why) != many
        assert many or item.options == ((3, 3, 3, 3),)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_embedding_and_head_may_share_the_budget(name: str, pico: Any, small: dict[str, Any], tmp_path: Path) -> None:
    """A file is no larger than without; where their bits are worth more in the blocks, they go there."""
    part = BUDGET | {"average": 2, "tables": [2, 3, 4, 8]}
    recipe = mixed(small, part, METHODS[0]) | {"embedding": {"bits": 8, "group_size": 8}}
    uniform = api.quantize(pico(name), tmp_path / "uniform", recipe | {"allocation": None})
    report = api.quantize(pico(name), tmp_path / "out", recipe)
    assert report["bytes"]["total"] <= uniform["bytes"]["total"]
    assert report["bytes"]["embeddings"] < uniform["bytes"]["embeddings"]
    assert report["bytes"]["linears"] > uniform["bytes"]["linears"]
    planned = api.plan(pico(name), recipe)
    assert report["bytes"]["total"] <= planned["bytes"]["total"]
    again = recipe | {"allocation": {"plan": str(tmp_path / "out" / "plan.json")}}
    api.quantize(pico(name), tmp_path / "again", again)
    assert tensors(tmp_path / "again") == tensors(tmp_path / "out")
    plan = plan_of(tmp_path / "out")
    table = next(n for n, matrix in plan["matrices"].items() if "distortion" not in matrix["why"])
    plan["matrices"][table]["widths"][0] = 5
    (tmp_path / "edited.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(InputError, match="a table has one"):
        api.quantize(pico(name), tmp_path / "other", recipe | {"allocation": {"plan": str(tmp_path / "edited.json")}})


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_table_loses_is_foretold(tied: bool, trained: Path, texts: Any, tmp_path: Path) -> None:
    """The forecast of each table is the divergence that rounding it makes, within half."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    folder = trained
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(tmp_path / "untied")
        tokenizer.save_pretrained(tmp_path / "untied")
        folder = tmp_path / "untied"
    source = open_source(folder)
    job = Job(Gptq(GptqConfig()), lambda _: (None, "kept"), QuantSpec(8, 32), QuantSpec(8, 32))
    text = Path(texts.calibration.partition(":")[0]).read_text("utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"][: 16 * 128]).view(16, 128)
    looking = SurveyOptions()
    ends = Ends(source, assign(source.map, job), (2, 3, 4, 6), looking)
    survey(source, [ids], {}, lambda *_: None, looking, ends)
    assert len(ends.items()) == (1 if tied else 2)
    with torch.no_grad():
        base = model(ids).logits.log_softmax(-1)
        for item in ends.items().values():
            table = model.get_parameter(item.ref.param).data
            kept = table.clone()
            for (bits, *_), foretold in zip(item.options, item.losses.tolist(), strict=True):
                table.copy_(rounded(kept, QuantSpec(8, 32), bits))
                logs = model(ids).logits.log_softmax(-1)
                actual = float((base.exp() * (base - logs)).sum(-1).mean())
                assert 0.5 < foretold / actual < 2.0, (item.ref.name, bits, foretold, actual)
            table.copy_(kept)


@pytest.mark.parametrize(("embedding", "head"), [(8, 16), (16, 8)])
def test_a_table_that_is_kept_takes_no_part(
    embedding: int, head: int, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = mixed(small, BUDGET | {"tables": [3, 8]}, METHODS[1])
    recipe |= {"embedding": {"bits": embedding, "group_size": 8}, "head": {"bits": head, "group_size": 8}}
    report = api.quantize(pico("llama"), tmp_path / "out", recipe)
    planned = set(plan_of(tmp_path / "out")["matrices"])
    assert ("model.embed_tokens" in planned, "lm_head" in planned) == (embedding < 16, head < 16)
    assert report["bytes"]["total"] <= api.plan(pico("llama"), recipe)["bytes"]["total"]


@pytest.mark.parametrize("scope", ["model", "matrix"])
def test_what_few_tokens_reached_is_not_sorted_either(
    scope: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    recipe = mixed(small, BUDGET | {"sequences": 1, "sort": True, "scope": scope, "average": 3}, METHODS[1])
    recipe["calibration"] = {**small["calibration"], "seqlen": 4}
    api.quantize(pico("llama"), tmp_path / "out", recipe)
    plan = plan_of(tmp_path / "out")["matrices"]
    assert plan and all("note" in matrix["why"] and "channels" not in matrix for matrix in plan.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": [{"match": "*", "keep": True}]}, "nothing to allocate"),
        ({"allocation": BUDGET | {"tables": [4]}, "embedding": {"bits": 16}}, "left at 16 bits; leave tables out"),
        (
            {"allocation": BUDGET | {"tables": [8]}, "embedding": {"bits": 2, "group_size": 8}},
            r"tables \[8\] take",
        ),
    ],
)
def test_a_budget_over_nothing_or_too_little_is_refused_before_the_survey(
    changes: dict[str, Any], says: str, pico: Any, small: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        api.quantize(pico("llama"), tmp_path / "out", mixed(small, BUDGET, METHODS[1]) | changes)
    assert not (tmp_path / "out").exists()


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


def test_a_survey_that_fails_leaves_nothing_behind(trained: Path, tmp_path: Path) -> None:
    source = open_source(trained)
    load = source.load_block

    def full(k: int, *arguments: Any) -> Any:
        if k == 2:
            raise OSError("disk full")
        return load(k, *arguments)

    source.load_block = full  # type: ignore[method-assign]
    ids = torch.randint(0, 250, (2, 16))
    names = [ref.name for ref in source.map.matrices]
    with pytest.raises(OSError, match="disk full"):
        survey(source, [ids], dict.fromkeys(names, 0), lambda *_: None, SurveyOptions(folder=tmp_path / "survey"))
    assert not (tmp_path / "survey").exists()


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


def test_where_padding_takes_the_rest_every_matrix_is_as_small_as_it_can_be() -> None:
    """Symmetric groups of 16 in 48 columns: one bit costs what two do until columns are padded to tiles."""
    ref, spec = MatrixRef("a", "a", (16, 48), 0, "linear"), QuantSpec(2, 16, True)
    how = Allocation("budget", average=1.8, widths=(1, 2, 3, 8))
    plan = choose("m", how, {"a": uniform_item(ref, spec, [4.0, 1.0, 0.3, 0.1], 1.8, list(how.widths))})
    assert plan.summary["bits_per_weight"] <= plan.summary["budget_bits_per_weight"]

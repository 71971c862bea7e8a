"""Widths by budget: kept, shared with embedding and head, and foretold by the survey."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocating import BUDGET, METHODS, mixed, plan_of, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitfloor import api
from bitfloor.calib.block import BlockRunner
from bitfloor.core.affine import decode
from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.methods.gptq import Gptq, Shown, solve
from bitfloor.methods.options import GptqConfig
from bitfloor.modeling.loader import open_source
from bitfloor.pipeline.budget import item_of
from bitfloor.pipeline.choice import Item, budget_bits, choose
from bitfloor.pipeline.job import Allocation, Job, assign
from bitfloor.pipeline.survey import Stakes, SurveyOptions, survey
from bitfloor.pipeline.survey_ends import Ends, rounded


def uniform_item(ref: MatrixRef, spec: QuantSpec, losses: list[float], average: float, widths: list[int]) -> Item:
    """A matrix whose groups all have one of the widths."""
    groups = len(spec.group_widths(ref.shape[1]))
    options = tuple((bits,) * groups for bits in widths)
    return Item(ref, spec, options, torch.tensor(losses, dtype=torch.float64), budget_bits(ref, spec, average))


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


def test_where_padding_takes_the_rest_every_matrix_is_as_small_as_it_can_be() -> None:
    """Symmetric groups of 16 in 48 columns: one bit costs what two do until columns are padded to tiles."""
    ref, spec = MatrixRef("a", "a", (16, 48), 0, "linear"), QuantSpec(2, 16, True)
    how = Allocation("budget", average=1.8, widths=(1, 2, 3, 8))
    plan = choose("m", how, {"a": uniform_item(ref, spec, [4.0, 1.0, 0.3, 0.1], 1.8, list(how.widths))})
    assert plan.summary["bits_per_weight"] <= plan.summary["budget_bits_per_weight"]

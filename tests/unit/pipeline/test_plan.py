"""What a run will need, from shapes alone: the terms that grow, grow; the ones that must not, do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pico import save_pico

from bitfloor.core.errors import InputError
from bitfloor.core.spec import QuantSpec
from bitfloor.modeling.loader import SourceModel, open_source
from bitfloor.pipeline import memory, plan
from bitfloor.pipeline.job import assign
from bitfloor.recipe.job import make_job
from bitfloor.recipe.load import load_recipe

RECIPE: dict[str, Any] = {"method": {"name": "gptq"}, "spec": {"bits": 3, "group_size": 32}}


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process holds at the moment is no part of the comparison."""
    monkeypatch.setattr(memory, "resident_memory", lambda: 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(save_pico(tmp_path_factory.mktemp("plan")))


def peak(source: SourceModel, data: tuple[int, int, int] | None, *, spill: bool = False, **changes: Any) -> int:
    job = make_job(load_recipe({**RECIPE, **changes}), source)
    return memory.peak_memory(source, job, assign(source.map, job), data, spill=spill)


def test_more_text_needs_more_memory(source: SourceModel) -> None:
    needs = [peak(source, (sequences, 64, 4)) for sequences in (8, 64, 256)]
    # One stream of float32 hidden states, [sequences, 64, 48]; of the float model's, two batches.
    assert needs[1] - needs[0] == 4 * 56 * 64 * 48 and needs[2] - needs[1] == 4 * 192 * 64 * 48
    # With the float model's beside it, all of them.
    corrected = {"method": {"name": "gptq", "correction": 0.5}}
    pair = [peak(source, (sequences, 64, 4), **corrected) for sequences in (64, 256)]
    assert pair[1] - pair[0] == 2 * 4 * 192 * 64 * 48
    assert peak(source, (64, 128, 4)) > needs[1] and peak(source, (64, 64, 16)) > needs[1]
    assert peak(source, (2, 64, 4)) == peak(source, (2, 64, 2))  # a batch is never larger than all there is


def test_spilled_text_does_not(source: SourceModel) -> None:
    assert peak(source, (64, 64, 4), spill=True) == peak(source, (4096, 64, 4), spill=True) < peak(source, (64, 64, 4))


def test_more_blocks_do_not_need_more_memory(source: SourceModel, tmp_path: Path) -> None:
    deep = open_source(save_pico(tmp_path, num_hidden_layers=9))
    assert peak(deep, (8, 64, 4)) == peak(source, (8, 64, 4))


def test_a_method_without_text_needs_less(source: SourceModel) -> None:
    assert peak(source, None, method={"name": "rtn", "range": "minmax"}) < peak(source, (8, 64, 4))


def test_learning_needs_its_parameters_and_what_the_way_back_keeps(source: SourceModel) -> None:
    learned = {"method": {"name": "signround"}}
    text = (64, 64, 4)
    assert peak(source, text, **learned) > peak(source, text, method={"name": "rtn"})
    # A rule that keeps a matrix out of it: shift, weight, gradient, its parts, and codes of the best step.
    kept = peak(source, text, **learned, layers=[{"match": "*.down_proj", "keep": True}])
    assert peak(source, text, **learned) - kept == 17 * 48 * 80
    # bitfloor's own learns from a latent weight, and needs the float block's inputs beside its outputs.
    own = {"method": {"name": "bitfloor"}}
    kept = peak(source, text, **own, layers=[{"match": "*.down_proj", "keep": True}])
    assert peak(source, text, **own) - kept == 21 * 48 * 80
    pair = [peak(source, (sequences, 64, 4), **own) for sequences in (64, 164)]
    assert pair[1] - pair[0] == 3 * 4 * 100 * 64 * 48
    # Clipping has nothing of its own for a weight; what it has for a group counts as one byte.
    clipped = {"method": {"name": "omniquant"}}
    kept = peak(source, text, **clipped, layers=[{"match": "*.down_proj", "keep": True}])
    assert peak(source, text, **clipped) - kept == 14 * 48 * 80
    tiers: dict[str, Any] = {"method": {"name": "ptq161"}, "spec": {"bits": 1, "group_size": -1}}
    kept = peak(source, text, **tiers, layers=[{"match": "*.down_proj", "keep": True}])
    assert peak(source, text, **tiers) - kept == 14 * 48 * 80
    # Targets go where the streams go.
    spilled = [peak(source, (sequences, 64, 4), spill=True, **learned) for sequences in (64, 164)]
    assert spilled[1] == spilled[0]


def test_tuning_counts_the_widths_that_groups_may_have(tmp_path: Path) -> None:
    deep = open_source(save_pico(tmp_path, num_hidden_layers=9))  # what is held of all blocks is the most of all

    def tuned(**changes: Any) -> int:
        return peak(deep, (4, 32, 1), tune={"steps": 1}, **changes)

    shapes = [ref.shape for ref in deep.map.matrices]
    order = 4 * sum(columns for _, columns in shapes)
    codes = sum(rows * columns for rows, columns in shapes)
    assert tuned(allocation={"policy": "sba"}) - tuned() == order
    assert tuned(allocation={"policy": "budget"}) - tuned() == order
    # All groups may have 8 bits, whose codes take two bytes.
    assert tuned(allocation={"policy": "budget", "widths": [2, 8]}) - tuned() == order + codes
    assert tuned(spec={"bits": 8, "group_size": 32}) - tuned() == codes


def test_widths_of_a_plan_are_counted_as_they_are(source: SourceModel) -> None:
    job = make_job(load_recipe({**RECIPE, "tune": {"steps": 1}}), source)
    shape = source.map.matrices[0].shape

    def held(*widths: int) -> int:
        return memory.held_codes(job, QuantSpec(3, 32, widths=widths), shape)

    rows, columns = shape
    assert columns == 48 and held() == held(2, 2) == rows * columns
    # Groups of 32 and 16 columns.
    assert held(1, 3) == rows * 48 + 4 * 48
    assert held(2, 8) == rows * (48 + 16) + 4 * 48 and held(8, 2) == rows * (48 + 32) + 4 * 48


def test_every_matrix_is_in_the_plan_once(source: SourceModel) -> None:
    changes = {"layers": [{"match": "*.down_proj", "keep": True, "reason": "sensitive"}], "head": {"bits": 16}}
    job = make_job(load_recipe({**RECIPE, **changes}), source)
    planned = plan.make_plan(source, job, None, device="cpu", spill=False)
    rows = {row["name"]: row for row in planned["matrices"]}
    assert len(rows) == len(planned["matrices"]) == 3 * 7 + 2
    kept = rows["model.layers.2.mlp.down_proj"]
    assert kept == {
        "name": "model.layers.2.mlp.down_proj",
        "shape": [48, 80],
        "bits": 32,  # as wide as the source has it
        "group_size": None,
        "rotation": None,
        "bytes": 48 * 80 * 4,
        "kept": "sensitive",
    }
    assert rows["lm_head"]["kept"] == "head.bits is 16"
    assert rows["model.layers.0.mlp.up_proj"]["rotation"] == 0
    assert rows["model.embed_tokens"]["bits"] == 8 and rows["model.embed_tokens"]["group_size"] == 48
    # [80, 48]: 5 row blocks of 2 tiles of 32 columns, 64 * 3 bytes each; 2 groups a row: a 16-bit scale each,
    # and for 16 rows 2 * 3 bytes of zero-points.
    assert rows["model.layers.0.mlp.up_proj"]["bytes"] == 5 * 2 * 64 * 3 + 80 * 2 * 2 + 5 * 2 * 2 * 3
    total = planned["bytes"]
    assert sum(row["bytes"] for row in rows.values()) == total["linears"] + total["embeddings"]
    assert total["other"] == 7 * 48 * 4  # norms


def test_a_plan_that_does_not_fit(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(load_recipe(RECIPE), source)
    monkeypatch.setattr(plan, "available_memory", lambda device: 1_500_000_000)
    planned = plan.make_plan(source, job, (8, 64, 4), device="cpu", spill=False)
    plan.check_memory(planned)
    planned = plan.make_plan(source, job, (2_000_000, 64, 4), device="cpu", spill=False)
    with pytest.raises(InputError, match="GB of memory and 1.5 GB are available"):
        plan.check_memory(planned)
    monkeypatch.setattr(plan, "available_memory", lambda device: None)
    assert plan.make_plan(source, job, (2_000_000, 64, 4), device="cpu", spill=False)["fits"]


def test_the_system_says_what_it_has() -> None:
    available = memory.available_memory("cpu")
    assert available is None or available > 1 << 20


def test_looking_for_widths_is_counted(source: SourceModel, tmp_path: Path) -> None:
    """The survey holds one block, its gradients, and one sequence, however deep the model and long the text."""
    text = (64, 64, 4)
    assert peak(source, text, allocation={"policy": "sba"}) > peak(source, text)
    long = {"calibration": {"sequences": 4, "seqlen": 2048}}
    surveyed = [peak(source, (n, 2048, 1), allocation={"policy": "budget"}, spill=True, **long) for n in (4, 400)]
    assert surveyed[0] == surveyed[1] > peak(source, (4, 2048, 1), spill=True, **long)
    deep = open_source(save_pico(tmp_path, num_hidden_layers=9))
    for policy in ("sba", "budget"):
        assert peak(deep, text, allocation={"policy": policy}) == peak(source, text, allocation={"policy": policy})


def test_a_pass_for_the_head_is_counted(source: SourceModel) -> None:
    """It holds a block beside what is outside of all; what it reads of the text has an end."""
    plain = {"method": {"name": "rtn", "range": "minmax"}, "embedding": {"bits": 4}}
    by_logits = {**plain, "head": {"rounding": "gptq"}}
    assert peak(source, (1, 32, 1), **by_logits) > peak(source, (1, 32, 1), **plain)
    assert peak(source, (40, 512, 1), spill=True, **by_logits) == peak(source, (400, 512, 1), spill=True, **by_logits)

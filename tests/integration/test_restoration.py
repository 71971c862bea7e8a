"""Two quantizations with a fine-tune in between: it helps, is what it says it is, and resumes to the same bytes."""

from __future__ import annotations

import datetime
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_learned_rounding import hashes, nll
from integration.test_tuning import stop_after
from safetensors.torch import load_file

from bitfloor import api
from bitfloor.cli.main import main
from bitfloor.core.errors import InputError
from bitfloor.modeling.loader import open_source
from bitfloor.pipeline import restore, restore_memory
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.folder import finished_report
from bitfloor.pipeline.job import assign
from bitfloor.pipeline.memory import OVERHEAD
from bitfloor.pipeline.restore_memory import restoring_memory
from bitfloor.recipe.job import make_job
from bitfloor.recipe.load import load_recipe

Recipe = dict[str, Any]
FEW = {"text": "default", "tokens": 512, "seqlen": 32, "accumulation": 1, "rank": 4, "rate": 0.001}  # 16 updates


@pytest.fixture
def plain(texts: Any) -> Recipe:
    """Two bits, rounded to nearest: reads no calibration text."""
    return {
        "name": "plain",
        "method": {"name": "rtn", "range": "minmax"},
        "spec": {"bits": 2, "group_size": 16},
        "embedding": {"bits": 8, "group_size": 32},
        "calibration": {"text": texts.calibration, "sequences": 4, "seqlen": 32, "batch_size": 2},
    }


def restored(recipe: Recipe, **changes: Any) -> Recipe:
    return {**recipe, "restore": {**FEW, **changes}}


def until_merged(model: Path, out: Path, recipe: Recipe) -> Path:
    """Run up to the second quantization; the journal's folder."""
    with pytest.raises(KeyboardInterrupt):
        api.quantize(model, out, recipe, progress=stop_after("the second quantization"))
    return out / ".bitfloor"


def dense(model: Path, out: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The weights that a quantization without the stage stands for."""
    api.quantize(model, out / "plain", recipe)
    api.export(out / "plain", out / "dense")
    return load_file(out / "dense" / "model.safetensors")


# -- what it is worth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["next-token", "distill"])
def test_a_restored_model_is_clearly_better_on_text_it_has_not_seen(
    objective: str, trained: Path, texts: Any, tmp_path: Path
) -> None:
    recipe = {
        "method": {"name": "ptq161", "steps": 16, "check_every": 8},
        "spec": {"bits": 1, "group_size": -1},
        "embedding": {"bits": 16},
        "calibration": {"text": texts.calibration, "sequences": 8, "seqlen": 128, "batch_size": 4},
    }
    api.quantize(trained, tmp_path / "before", recipe)
    stage = {"tokens": 20_480, "seqlen": 64, "batch_size": 8, "accumulation": 1, "rate": 0.01, "rank": 16}
    report = api.quantize(trained, tmp_path / "after", restored(recipe, objective=objective, **stage))
    told = report["restoration"]
    assert told["after"] < told["before"] - 0.1 and told["note"] is None and told["updates"] == 40
    assert told["tokens"] == told["distinct_tokens"] == 20_480 and told["adapted"] == 18
    assert nll(tmp_path / "after", texts) < nll(tmp_path / "before", texts) - 0.1


# -- what it is ------------------------------------------------------------------------------------------------------


def test_the_restored_weights_are_the_dequantized_ones_and_the_adapters(
    pico: Any, plain: Recipe, tmp_path: Path
) -> None:
    journal = until_merged(pico("llama"), tmp_path / "out", restored(plain, alpha=6.0))
    found = load_file(journal / "restored" / "model.safetensors")
    first, source = dense(pico("llama"), tmp_path, plain), load_file(pico("llama") / "model.safetensors")
    learnt = load_file(journal / "adapters.safetensors")
    assert set(found) == set(source) and learnt
    moved = 0
    for name in found:
        matrix = name.removesuffix(".weight")
        a, b = (learnt.get(f"{matrix}.lora_{part}.default.weight") for part in "AB")
        if a is not None and b is not None:
            expected = first[name] + 6.0 / 4 * (b @ a)
            assert torch.allclose(found[name], expected, rtol=1e-5, atol=1e-6)
            moved += not torch.equal(found[name], first[name])
        elif name.endswith("o_proj.weight"):
            assert torch.equal(found[name], first[name]) and not torch.equal(found[name], source[name])
        else:  # embedding, head and norms
            assert torch.equal(found[name], source[name])
    assert moved == 18 and len(learnt) == 36


def test_adapters_that_learnt_nothing_leave_the_first_quantization(
    trained: Path, plain: Recipe, tmp_path: Path
) -> None:
    # A step that is far too large: the start is kept, and the second quantization starts from the first one's result.
    journal = until_merged(trained, tmp_path / "out", restored(plain, rate=1.0, warmup=0.0))
    found = load_file(journal / "restored" / "model.safetensors")
    first = dense(trained, tmp_path, plain)
    matrices = [name for name in found if name.endswith("proj.weight")]
    assert len(matrices) == 21 and all(torch.equal(found[name], first[name]) for name in matrices)
    report = api.quantize(trained, tmp_path / "out", restored(plain, rate=1.0, warmup=0.0))
    assert report["restoration"]["step"] == 0 and report["restoration"]["after"] == report["restoration"]["before"]
    assert "diverged" in report["restoration"]["note"]


def test_the_restored_model_is_an_ordinary_one_and_gone_at_the_end(pico: Any, plain: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    journal = until_merged(pico("llama"), out, restored(plain))
    shutil.copytree(journal / "restored", tmp_path / "kept")
    source = open_source(tmp_path / "kept")
    report = api.quantize(pico("llama"), out, restored(plain))
    assert report["restoration"]["model"] == source.fingerprint
    assert not (out / ".bitfloor").exists() and finished_report(out) == report
    # Quantizing it by hand gives the same packed weights.
    api.quantize(tmp_path / "kept", tmp_path / "by hand", plain)
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "by hand"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_half_precision_source_is_restored_in_its_own_type(pico: Any, plain: Recipe, tmp_path: Path) -> None:
    model = tmp_path / "half"
    shutil.copytree(pico("llama"), model)
    from safetensors.torch import save_file

    weights = load_file(model / "model.safetensors")
    save_file({name: w.bfloat16() for name, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    journal = until_merged(model, tmp_path / "out", restored(plain))
    found = load_file(journal / "restored" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma2", "qwen2", "falcon", "phi3", "opt", "gpt_neox", "gpt_oss"])
def test_every_kind_of_model_can_be_restored(name: str, pico: Any, plain: Recipe, tmp_path: Path) -> None:
    report = api.quantize(pico(name), tmp_path / "out", restored(plain, tokens=128))
    told = report["restoration"]
    assert told["after"] <= told["before"] and told["updates"] == 4 and told["adapted"] > 0
    assert bool(told["left"]) == (name in ("mixtral", "gpt_oss"))  # experts
    assert api.load(tmp_path / "out")(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_other_adapters_and_options(pico: Any, plain: Recipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"adapter": "loha", "rank": 2, "targets": ["*.q_proj", "*.o_proj"], "leave": []}
    report = api.quantize(pico("llama"), tmp_path / "loha", {**plain, "restore": {**FEW, **changes}})
    assert report["restoration"]["adapted"] == 6 and report["restoration"]["after"] < report["restoration"]["before"]
    options = {"use_dora": True}
    report = api.quantize(pico("llama"), tmp_path / "dora", restored(plain, options=options, seqlen=32))
    assert report["restoration"]["after"] < report["restoration"]["before"]
    assert report["recipe"]["restore"]["options"] == options


def test_text_may_be_read_more_than_once_if_asked_to(pico: Any, plain: Recipe, tmp_path: Path) -> None:
    report = api.quantize(pico("llama"), tmp_path / "out", restored(plain, passes=4))
    assert report["restoration"]["tokens"] == 512 == 4 * report["restoration"]["distinct_tokens"]
    assert report["restoration"]["passes"] == 4


# -- resuming --------------------------------------------------------------------------------------------------------


def stop_at_block(block: int, count: int) -> Callable[[Event], None]:
    """Kill the run when that block is finished for the ``count``-th time."""
    left = [count]

    def stop(event: Event) -> None:
        if event.kind == "block" and event.block == block:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    return stop


def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(
    pico: Any, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = pico("llama"), restored(small, objective="distill") | {"tune": {"steps": 4, "rate": 0.01}}
    report = api.quantize(model, tmp_path / "whole", recipe)
    assert report["restoration"]["step"] > 0 and "tuning" in report
    out = tmp_path / "out"

    def kill(stop: Callable[[Event], None]) -> None:
        with pytest.raises(KeyboardInterrupt):
            api.quantize(model, out, recipe, progress=stop, spill=tmp_path / "spill")

    kill(stop_at_block(1, 1))
    kill(stop_after("restoring: the quantized"))
    kill(stop_after("restoring: update 4 "))
    monkeypatch.setattr(restore, "STORE_AFTER", 0.0)
    kill(stop_after("restoring: update 12 "))
    # A part of the first quantization is damaged meanwhile, and made again.
    damaged = out / ".bitfloor" / "first-block-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    kill(stop_after("restoring: writing"))
    assert not (out / ".bitfloor" / "restored" / "config.json").exists()
    kill(stop_after("the second quantization"))
    weights = out / ".bitfloor" / "restored" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3] + b"xyz")
    messages: list[str] = []

    def stop(event: Event) -> None:
        messages.append(event.message)
        if event.kind == "block":
            raise KeyboardInterrupt

    kill(stop)
    assert "restoring: writing the restored model" in messages  # once more
    messages.clear()
    api.quantize(model, out, recipe, progress=lambda event: messages.append(event.message))
    assert not any(message.startswith("restoring") for message in messages)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_another_text_is_another_run(pico: Any, plain: Recipe, texts: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        api.quantize(pico("llama"), tmp_path, restored(plain), progress=stop_after("restoring"))
    with pytest.raises(InputError, match="restoration tokens was"):
        api.quantize(pico("llama"), tmp_path, restored(plain, text=texts.calibration))


# -- widths by group -------------------------------------------------------------------------------------------------


def test_widths_are_found_again_and_a_given_plan_holds_for_both(pico: Any, small: Recipe, tmp_path: Path) -> None:
    model = pico("llama")
    recipe = {**small, "spec": {"bits": 2, "group_size": 16}, "allocation": {"policy": "budget", "average": 2}}
    api.quantize(model, tmp_path / "plain", recipe)
    report = api.quantize(model, tmp_path / "found", restored(recipe))
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("plain", "found")]
    assert plans[1]["model"] == report["restoration"]["model"] != plans[0]["model"]
    assert plans[1]["matrices"] != plans[0]["matrices"]
    given = {**recipe, "allocation": {"plan": str(tmp_path / "plain" / "plan.json")}}
    report = api.quantize(model, tmp_path / "given", restored(given))
    assert json.loads((tmp_path / "given" / "plan.json").read_text())["matrices"] == plans[0]["matrices"]
    with pytest.raises(InputError, match="leave the stage out with restore=null"):
        api.allocate(model, tmp_path / "plan.json", restored(recipe))
    # What a restored model's run has found fits that model alone.
    found = {**recipe, "allocation": {"plan": str(tmp_path / "found" / "plan.json")}}
    with pytest.raises(InputError, match="the plan was made for a model with fingerprint"):
        api.quantize(model, tmp_path / "other", restored(found))


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tokens": 31}, "restore.tokens = 31 is less than one update reads"),
    ({"tokens": 10**9}, "is too short for restore.tokens = 1,000,000,000: .* or read it more than once"),
    ({"tokens": 10**9, "mode": "documents"}, r"or read it as one running text \(restore.mode=packed\)"),
    ({"seqlen": 4096}, "restore.seqlen = 4,096 is longer than this model's context of 128"),
    ({"adapter": "lorra", "rank": None}, "'lorra' is no adapter of this peft; did you mean lora"),
    ({"adapter": "prefix_tuning", "rank": None}, "prefix_tuning is not for matrices"),
    ({"adapter": "ia3"}, "restore.rank = 4 says nothing to the adapter ia3"),
    ({"adapter": "lily", "rank": None}, "lily cannot be merged"),
    ({"options": {"use_dorra": True}}, "restore.options.use_dorra is no option .* did you mean use_dora"),
    ({"options": {"target_modules": ["q_proj"]}}, "target_modules is set by the stage itself"),
    ({"options": {"r": 8}}, "restore.rank and restore.options.r are one setting"),
    ({"options": {"init_lora_weights": 7}}, "peft "),
    ({"options": {"init_lora_weights": "eva"}}, "init_lora_weights = eva is made from data"),
    ({"alpha": math.inf}, r"restore.alpha = Infinity is not allowed"),
    ({"options": {"alpha_pattern": {"q_proj": math.nan}}}, "restore.options = .* use a mapping of options"),
    ({"options": {"use_dora": datetime.date(2020, 1, 1)}}, "restore.options = .* use a mapping of options"),
    ({"targets": ["*.qproj"]}, "restore.targets has '\\*.qproj', which matches none of the model's 21 matrices"),
    ({"leave": ["*.oproj"]}, "restore.leave has '\\*.oproj', which matches none"),
    ({"targets": ["*.o_proj"]}, "leaves no matrix to adapt .*unless restore.leave says otherwise"),
    ({"leave": ["*"]}, "leaves no matrix to adapt; name others"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], said: str, pico: Any, plain: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        api.quantize(pico("llama"), tmp_path / "out", restored(plain, **changes))
    assert not (tmp_path / "out").exists()


def test_a_calibration_text_that_nothing_reads_is_refused(pico: Any, plain: Recipe, texts: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would not be read: .* calibrates on none, and restore.text is another"):
        api.quantize(pico("llama"), tmp_path / "out", restored(plain), calibration=texts.calibration)
    assert not (tmp_path / "out").exists()
    # Without a text of its own the stage reads it.
    recipe = restored(plain, text=None, tokens=64)
    report = api.quantize(pico("llama"), tmp_path / "out", recipe, calibration=texts.calibration)
    assert report["restoration"]["tokens"] == 64


def test_experts_are_refused_if_asked_for(pico: Any, plain: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="asks for model.layers.0.mlp.experts.0"):
        api.quantize(pico("mixtral"), tmp_path / "out", restored(plain, targets=["*experts*"]))
    assert not (tmp_path / "out").exists()


def test_kept_matrices_stay_as_they_are(pico: Any, plain: Recipe, tmp_path: Path) -> None:
    recipe = restored({**plain, "layers": [{"match": "*.down_proj", "keep": True}]})
    report = api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert report["restoration"]["left"] == {"the recipe keeps it": 3}
    found, source = load_file(tmp_path / "out" / "model.safetensors"), load_file(pico("llama") / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], source[name])


def test_without_peft_a_sentence_says_what_to_install(
    pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = ["quantize", str(pico("llama")), "--out", str(tmp_path / "out"), "--recipe", "ptq161-restored"]
    assert main([*arguments, "restore.seqlen=64", "calibration.seqlen=64"]) == 2
    assert "install it with: pip install peft" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_keeps_the_best(
    pico: Any, plain: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = restore.Judge.loss, 0

    def fail(self: Any, ids: Any, which: Any) -> Any:
        nonlocal calls
        found = loss(self, ids, which)
        if torch.is_grad_enabled():
            calls += 1
            return found * (float("nan") if calls == 10 else 1.0)
        return found

    monkeypatch.setattr(restore.Judge, "loss", fail)
    report = api.quantize(pico("llama"), tmp_path / "out", restored(plain))
    told = report["restoration"]
    assert "8 of 9 updates are kept" in told["note"] and told["step"] == 8 and told["updates"] == 9
    assert told["after"] < told["before"]


# -- the recipe ------------------------------------------------------------------------------------------------------


def test_the_preset_is_ptq161_and_the_stage() -> None:
    recipe = load_recipe("ptq161-restored")
    assert recipe.restore is not None and recipe.tune is None
    assert (recipe.restore.adapter, recipe.restore.rank, recipe.restore.alpha, recipe.restore.dropout) == (
        *("lora", 64),
        *(16.0, 0.1),
    )
    assert load_recipe("ptq161-restored", ["restore=null"]).sha256() == load_recipe("ptq161").sha256()
    assert "restore" not in load_recipe("ptq161").content()
    for key in ("tokens=65536", "objective=distill", "held_out=0.1", "rank=8", "leave=[]"):
        assert load_recipe("ptq161-restored", [f"restore.{key}"]).sha256() != recipe.sha256()
    assert load_recipe("rtn-w2g64", ["restore.tokens=1000"]).restore.rate == 1e-4  # type: ignore[union-attr]


def test_a_plan_knows_that_the_whole_model_is_held(pico: Any, plain: Recipe) -> None:
    source = open_source(pico("llama"))

    def planned(**changes: Any) -> int:
        job = make_job(load_recipe(restored(plain, **changes)), source)
        return restoring_memory(source, job, assign(source.map, job), spill=False) - OVERHEAD

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restore_memory, "resident_memory", lambda: 0)
        parameters = sum(math.prod(info.shape) for info in source.tensors.values())
        small, large = planned(rank=1), planned(rank=101)
        assert small > 4 * parameters
        # A number of each adapter is held five times, and four more while a state is stored.
        each = sum(sum(ref.shape) for ref in source.map.matrices if not ref.name.endswith("o_proj"))
        assert large == 4 * parameters + 4 * 9 * 101 * each
        sequences = (512 + 32 * 1) // 32
        assert planned(objective="distill", rank=101) - large >= 4 * 48 * 32 * sequences
    assert restoring_memory(source, make_job(load_recipe(plain), source), None, spill=False) == 0  # type: ignore[arg-type]

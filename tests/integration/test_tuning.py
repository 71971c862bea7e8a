"""The last stage, end to end: it helps, resumes to the same bytes, and runs on every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.test_learned_rounding import hashes, nll
from safetensors.torch import load_file

from bitfloor import api
from bitfloor.core.errors import InputError
from bitfloor.pipeline import journal, student
from bitfloor.pipeline.events import Event
from bitfloor.recipe.load import load_recipe


def tuned(recipe: dict[str, Any], steps: int = 6, **options: Any) -> dict[str, Any]:
    return {**recipe, "tune": {"steps": steps, "rate": 0.01, **options}}


@pytest.fixture
def plain(learned: Any) -> Callable[..., dict[str, Any]]:
    """Fast recipes: the start alone."""
    return lambda **options: learned("bitfloor", steps=0, **options)


@pytest.mark.parametrize("method", ["bitfloor", "rtn"])
def test_a_tuned_model_is_better_on_text_it_has_not_seen(
    method: str, trained: Path, learned: Any, texts: Any, tmp_path: Path
) -> None:
    recipe = learned("bitfloor", bits=2, steps=0)
    recipe["calibration"] |= {"sequences": 32, "seqlen": 128, "batch_size": 4}
    if method == "rtn":  # reads no text itself
        recipe["method"] = {"name": "rtn", "range": "minmax"}
    api.quantize(trained, tmp_path / "before", recipe)
    report = api.quantize(trained, tmp_path / "after", tuned(recipe, steps=40))
    assert report["tuning"]["after"] < report["tuning"]["before"] and report["tuning"]["note"] is None
    assert nll(tmp_path / "after", texts) < nll(tmp_path / "before", texts) - 0.02
    # Codes and zero-points stay, scales and norms move.
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert one.keys() == other.keys()
    moved = {name.rpartition(".")[2] for name in one if not torch.equal(one[name], other[name])}
    assert moved == {"scale", "weight"}
    assert not torch.equal(one["model.norm.weight"], other["model.norm.weight"])


def stop_after(message: str) -> Callable[[Event], None]:
    """A listener that kills the run at the first message that begins so."""

    def stop(event: Event) -> None:
        if event.message.startswith(message):
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("policy", ["budget", "sba"])
def test_scales_of_mixed_widths_learn_too(policy: str, trained: Path, learned: Any, texts: Any, tmp_path: Path) -> None:
    recipe = learned("gptq", bits=2)
    recipe["calibration"] |= {"sequences": 32, "seqlen": 128, "batch_size": 4}
    recipe["spec"] = {"bits": 2, "group_size": 16, "rotation": 16}
    recipe["allocation"] = {"policy": policy} | ({"average": 1.7, "sequences": 8} if policy == "budget" else {})
    messages: list[str] = []
    api.quantize(trained, tmp_path / "before", recipe)
    learning = tuned(recipe, steps=24, norms=False)
    report = api.quantize(trained, tmp_path / "after", learning, progress=lambda event: messages.append(event.message))
    assert report["tuning"]["after"] < report["tuning"]["before"] and report["tuning"]["note"] is None
    assert not any("tuning leaves" in message for message in messages)
    assert nll(tmp_path / "after", texts) < nll(tmp_path / "before", texts) - 0.02
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    # All scales move, and the offsets of one-bit groups with them; codes, zero-points, orders and norms stay.
    assert one.keys() == other.keys()
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    assert moved == {name for name in one if name.endswith((".scale", ".offset"))}
    assert {"order", "offset"} <= {name.rpartition(".")[2] for name in one}
    assert {name for name in moved if name.endswith(".scale")} == set(report["tuning"]["tuned"])


def test_one_bit_matrices_learn_too(pico: Any, plain: Any, tmp_path: Path) -> None:
    recipe = {**plain(bits=1), "method": {"name": "rtn", "range": "minmax"}}
    api.quantize(pico("llama"), tmp_path / "before", recipe)
    report = api.quantize(pico("llama"), tmp_path / "after", tuned(recipe, rate=0.002, norms=False))
    assert report["tuning"]["after"] < report["tuning"]["before"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    moved = {name.rpartition(".")[2] for name in one if not torch.equal(one[name], other[name])}
    assert moved == {"scale", "offset"}


def test_a_run_of_mixed_widths_killed_while_tuning_goes_on_to_the_same_bytes(
    trained: Path, plain: Any, tmp_path: Path
) -> None:
    recipe = tuned(plain(bits=2), steps=8)
    recipe["calibration"] |= {"sequences": 32, "seqlen": 64, "batch_size": 4}
    recipe["spec"] = {"bits": 2, "group_size": 16, "rotation": 16}
    recipe["allocation"] = {"policy": "sba"}
    report = api.quantize(trained, tmp_path / "whole", recipe)
    assert report["tuning"]["step"] > 0
    for message in ("tuning: step 3 ", "tuning: step 7 "):
        with pytest.raises(KeyboardInterrupt):
            api.quantize(trained, tmp_path / "out", recipe, progress=stop_after(message))
    api.quantize(trained, tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert any(name.endswith(".offset") for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "qwen3"])
def test_every_kind_of_model_can_be_tuned(name: str, pico: Any, plain: Any, tmp_path: Path) -> None:
    report = api.quantize(pico(name), tmp_path / "out", tuned(plain(), steps=3))
    assert report["tuning"]["after"] <= report["tuning"]["before"]
    logits = api.load(tmp_path / "out")(torch.tensor([[5, 6, 7]])).logits
    assert logits.isfinite().all()


def test_a_run_killed_while_tuning_or_writing_goes_on_to_the_same_bytes(
    pico: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = pico("llama"), tuned(plain(), steps=8)
    api.quantize(model, tmp_path / "whole", recipe)
    for message in ("tuning: the float", "tuning: step 3 ", "tuning: step 7 "):
        with pytest.raises(KeyboardInterrupt):
            api.quantize(model, tmp_path / "out", recipe, progress=stop_after(message), spill=tmp_path / "spill")
    write, count = journal.Journal.put, 0

    def die(self: Any, part: str, entry: Any) -> None:
        nonlocal count
        if part.startswith("tuned-"):
            count += 1
            if count == 2:
                raise KeyboardInterrupt
        write(self, part, entry)

    monkeypatch.setattr(journal.Journal, "put", die)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(model, tmp_path / "out", recipe)
    monkeypatch.undo()
    # A part that was damaged meanwhile is made again, from blocks as they were before tuning.
    damaged = tmp_path / "out" / ".bitfloor" / "block-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    api.quantize(model, tmp_path / "out", recipe)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_norms_can_be_left_alone(pico: Any, plain: Any, tmp_path: Path) -> None:
    api.quantize(pico("llama"), tmp_path / "out", tuned(plain(), norms=False))
    before = load_file(pico("llama") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_what_cannot_be_tuned_is_refused_or_said(
    pico: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tuned(plain())
    recipe["calibration"] |= {"batch_size": 4}
    with pytest.raises(InputError, match="make one batch"):
        api.quantize(pico("llama"), tmp_path / "one", recipe)
    assert not (tmp_path / "one").exists()
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        api.quantize(pico("llama"), tmp_path / "one", tuned(plain()))
    # No method makes a matrix whose scales cannot be tuned, but the format has them.
    monkeypatch.setattr(student, "tunable", lambda weight: False)
    messages: list[str] = []
    alone = tuned(plain(), norms=False)
    report = api.quantize(
        pico("llama"), tmp_path / "alone", alone, progress=lambda event: messages.append(event.message)
    )
    assert report["tuning"]["note"] == "nothing was tuned: the model has no scale or norm"
    assert "tuning leaves the scales of 21 matrices: they have channel scales" in messages


@pytest.mark.parametrize("changes", [{"head": {"bits": 16}}, {"embedding": {"bits": 4}, "head": {"bits": 8}}])
def test_heads_of_their_own_and_kept_matrices(changes: dict[str, Any], pico: Any, plain: Any, tmp_path: Path) -> None:
    recipe = {**tuned(plain(), rate=0.001), **changes, "layers": [{"match": "*.down_proj", "keep": True}]}
    report = api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert report["tuning"]["after"] <= report["tuning"]["before"] and report["tuning"]["note"] is None
    assert not any("down_proj" in name for name in report["tuning"]["tuned"])
    assert api.load(tmp_path / "out")(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_the_scales_of_a_head_of_its_own_learn_too(pico: Any, plain: Any, tmp_path: Path) -> None:
    recipe = {**tuned(plain(), steps=8, head=True, norms=False), "head": {"bits": 4, "group_size": 32}}
    report = api.quantize(pico("llama"), tmp_path / "out", recipe)
    assert "lm_head.scale" in report["tuning"]["tuned"] and report["tuning"]["step"] > 0
    without = {**recipe, "tune": {**recipe["tune"], "head": False}}
    api.quantize(pico("llama"), tmp_path / "without", without)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "without"))
    assert torch.equal(one["lm_head.codes"], other["lm_head.codes"])
    assert not torch.equal(one["lm_head.scale"], other["lm_head.scale"])
    assert (
        load_recipe("bitfloor-tuned-w2g64", ["tune.head=true"]).sha256() != load_recipe("bitfloor-tuned-w2g64").sha256()
    )
    assert "head" not in load_recipe("bitfloor-tuned-w2g64").content()["tune"]


@pytest.mark.parametrize(
    ("model", "head", "said"), [("gpt2", None, "head is its embedding"), ("llama", 16, "head.bits leaves it at 16")]
)
def test_a_head_that_cannot_be_tuned_is_refused(
    model: str, head: int | None, said: str, pico: Any, plain: Any, tmp_path: Path
) -> None:
    recipe = {**tuned(plain(), head=True), "head": {"bits": head}}
    with pytest.raises(InputError, match=said):
        api.quantize(pico(model), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_step_that_is_too_large_keeps_the_start(pico: Any, plain: Any, tmp_path: Path) -> None:
    model = pico("llama")
    api.quantize(model, tmp_path / "plain", plain())
    report = api.quantize(model, tmp_path / "out", tuned(plain(), steps=4, rate=1.0))
    assert report["tuning"]["step"] == 0 and report["tuning"]["after"] == report["tuning"]["before"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tune.steps=0", "tune.steps = 0 is not allowed"),
        ("tune.rate=2", "tune.rate = 2"),
        ("tune.rat=0.1", "unknown key tune.rat"),
        ("tune=7", "tune = 7 is not allowed"),
    ],
)
def test_wrong_settings_are_refused(override: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe("bitfloor-tuned-w2g64", [override])


def test_without_the_stage_a_recipe_is_what_it_was() -> None:
    assert "tune" not in load_recipe("gptq-w2g64").content()
    assert load_recipe("bitfloor-tuned-w2g64", ["tune=null"]).sha256() == load_recipe("bitfloor-w2g64").sha256()

"""Each command passes on what it was given and prints what it was told. The api itself is replaced by its signature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from cli.conftest import Folder, Run

from bitfloor import api
from bitfloor.cli.quantize import block_of
from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.pipeline.events import Event


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The api with every function replaced by a mock that accepts only the real one's parameters."""
    for name in ("quantize", "plan", "evaluate", "generate", "export"):
        monkeypatch.setattr(api, name, create_autospec(getattr(api, name)))
    return api


def test_quantize_passes_everything_on_and_sums_up(run: Run, fake: Any, folder: Folder) -> None:
    def quantize(*_: Any, progress: Any, **__: Any) -> dict[str, Any]:
        progress(Event("stage", message="reading the calibration text"))
        progress(Event("block", block=2, blocks=30, loss=0.00123, seconds=12.0, eta=100.0))
        progress(Event("note", message="model.layers.2.up: fell back"))
        return folder.report

    fake.quantize.side_effect = quantize
    options = ["--recipe", "rtn-w2g64", "--calib", "a.txt", "--device", "cuda", "--no-resume", "--spill", "s"]
    outcome = run("quantize", "M", "bits=3", "seed=1", "--out", folder.path, *options, "--trust-remote-code")
    assert outcome.code == 0, outcome.err
    (arguments, options_given) = fake.quantize.call_args
    assert arguments == ("M", folder.path, "rtn-w2g64")
    del options_given["progress"]
    assert options_given == {
        "overrides": ["bits=3", "seed=1"],
        "calibration": "a.txt",
        "device": "cuda",
        "resume": False,
        "trust_remote_code": True,
        "spill": Path("s"),
    }
    lines = outcome.err.splitlines()
    assert lines[:3] == [
        "reading the calibration text",
        "block 3/30  loss 0.00123  12 s, 1 min 40 s left",
        "note: model.layers.2.up: fell back",
    ]
    assert "bitfloor generate" in outcome.err and "3 matrices, 1 kept" in outcome.out
    assert "0.25 (model.layers.2)" in outcome.out


def test_quantize_defaults(run: Run, fake: Any, folder: Folder) -> None:
    fake.quantize.return_value = folder.report
    assert run("quantize", "M", "--out", folder.path).code == 0
    given = fake.quantize.call_args.kwargs
    assert (given["overrides"], given["calibration"], given["device"], given["resume"]) == ((), None, "cpu", True)
    assert fake.quantize.call_args.args[2] == "gptq-w4g64"


def test_an_interrupted_run_says_how_to_go_on(run: Run, fake: Any, tmp_path: Path) -> None:
    fake.quantize.side_effect = KeyboardInterrupt
    outcome = run("quantize", "M", "--out", tmp_path)
    assert outcome.code == 130 and "run the same command again to continue" in outcome.err
    fake.plan.side_effect = KeyboardInterrupt
    outcome = run("plan", "M")
    assert (outcome.code, outcome.err) == (130, "error: interrupted.\n")


SCORE = {"text": "wiki", "value": 12.3456, "windows": 20, "seqlen": 2048, "tokens": 40940, "vs_baseline": None}


def test_eval_prints_json_and_nothing_else(run: Run, fake: Any) -> None:
    result = {"model": "M", "perplexity": [SCORE]}

    def evaluate(*_: Any, progress: Any, **__: Any) -> dict[str, Any]:
        progress(Event("window", block=0, blocks=20, seconds=1.0, eta=19.0, message="M"))
        return result

    fake.evaluate.side_effect = evaluate
    outcome = run(
        "eval", "M", "--perplexity", "a.txt", "--perplexity", "b.txt", "--windows", 3, "--seqlen", 64, "--json"
    )
    assert outcome.code == 0 and json.loads(outcome.out) == result
    assert outcome.err == "M: window 1/20  1.0 s, 19 s left\n"
    given = fake.evaluate.call_args.kwargs
    assert (given["perplexity"], given["windows"], given["seqlen"]) == (("a.txt", "b.txt"), 3, 64)
    assert (given["baseline"], given["divergence"], given["device"]) == (None, False, "cpu")


def test_eval_against_a_baseline_gives_a_verdict(run: Run, fake: Any) -> None:
    versus = {"delta_nll": 0.004, "ci95": [0.001, 0.0079]}
    score = {**SCORE, "vs_baseline": versus, "divergence": {"kl": 0.01234567, "top1_agreement": 0.9512}}
    fake.evaluate.return_value = {"model": "M", "perplexity": [score]}
    outcome = run("eval", "M", "--baseline", "B", "--divergence")
    assert fake.evaluate.call_args.kwargs["perplexity"] == ("default",)
    row = next(line for line in outcome.out.splitlines() if "wiki" in line).split("  ")
    cells = [cell.strip() for cell in row if cell.strip()]
    assert cells == [
        "wiki",
        "12.346",
        "20",
        "2048",
        "40,940",
        "12.296",  # the baseline's perplexity: 12.3456 * exp(-0.004)
        "+0.0040",
        "+0.0010 to +0.0079",
        "not worse",
        "0.01235",
        "95.12%",
    ]


def test_a_number_that_is_not_finite_is_null_in_json(run: Run, fake: Any) -> None:
    fake.evaluate.return_value = {"model": "M", "perplexity": [{**SCORE, "value": float("inf")}]}
    assert json.loads(run("eval", "M", "--json").out)["perplexity"][0]["value"] is None


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (None, "no interval"),
        ((-0.02, -0.01), "better"),
        ((-0.02, 0.009), "not worse"),
        ((-0.02, 0.02), "undecided"),
        ((0.001, 0.02), "worse"),
        ((0.001, 0.009), "not worse"),
    ],
)
def test_verdicts(interval: tuple[float, float] | None, expected: str) -> None:
    from bitfloor.cli.evaluate import NOT_WORSE, verdict
    from bitfloor.evaluation.paired import MARGIN

    assert verdict(interval) == expected and NOT_WORSE == MARGIN


def planned() -> dict[str, Any]:
    entry = {"shape": [64, 64], "bits": 4, "group_size": 64, "rotation": 0, "bytes": 2208, "kept": None}
    names = [f"model.layers.{i}.q_proj" for i in range(12)]
    return {
        "model": "M",
        "recipe": "gptq-w4g64",
        "matrices": [
            *({"name": name, **entry} for name in names),
            {"name": "head", **entry, "bits": 16, "group_size": None, "kept": "head.bits is 16"},
        ],
        "bytes": {"total": 30_000, "linears": 26_496, "embeddings": 2208, "other": 1296},
        "bits_per_linear_weight": 4.3125,
        "bits_per_parameter": 4.5,
        "peak_memory_bytes": 1_500_000_000,
        "available_memory_bytes": None,
        "fits": True,
    }


def test_plan_folds_equal_matrices_of_all_blocks(run: Run, fake: Any) -> None:
    fake.plan.return_value = planned()
    outcome = run("plan", "M", "--recipe", "gptq-w3g64", "group_size=32")
    assert fake.plan.call_args.args == ("M", "gptq-w3g64") and fake.plan.call_args.kwargs["overrides"] == [
        "group_size=32"
    ]
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.strip()}
    assert rows["model.layers.*.q_proj"] == ["model.layers.*.q_proj", *["12", "64", "x", "64", "4", "64", "26.5", "kB"]]
    assert rows["head"] == ["head", *["1", "64", "x", "64", "16", "-", "2.21", "kB", "head.bits", "is", "16"]]
    assert rows["peak"] == ["peak", "memory", "1.50", "GB"] and rows["available"][-1] == "unknown"
    assert json.loads(run("plan", "M", "--json").out) == planned()


def test_generate_prints_the_prompt_and_its_continuation(run: Run, fake: Any) -> None:
    fake.generate.return_value = " there [bold]was"
    assert run("generate", "D", "Once upon a time", "--max-new-tokens", 3).out == "Once upon a time there [bold]was\n"
    defaults = {"device": "cpu", "chat": False, "backend": "auto", "activations": None}
    assert fake.generate.call_args.kwargs == {"max_new_tokens": 3, **defaults}
    fake.generate.return_value = "Hello."
    assert run("generate", "D", "Hi", "--chat", "--backend", "cpu", "--activations", "int8").out == "Hello.\n"
    given = fake.generate.call_args.kwargs
    assert (given["chat"], given["backend"], given["activations"]) == (True, "cpu", "int8")


def test_export_names_what_it_wrote(run: Run, fake: Any) -> None:
    fake.export.return_value = {"format": "dense", "path": "O", "bytes": 2_500_000, "tensors": 3}
    assert run("export", "D", "O").err == "wrote O (dense, 2.50 MB)\n"
    assert fake.export.call_args.args == (Path("D"), Path("O")) and fake.export.call_args.kwargs == {"format": "dense"}


def test_env_prints_whatever_it_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"python": "3.11", "cpu": {"flags": ["avx2", "fma"], "threads": 2}, "extras": {"gguf": True, "hub": None}}
    monkeypatch.setattr(api, "environment", create_autospec(api.environment, return_value=facts))
    assert json.loads(run("env", "--json").out) == facts
    lines = [line.split() for line in run("env").out.splitlines()]
    assert lines == [
        ["python", "3.11"],
        ["cpu"],
        ["flags", "avx2", "fma"],
        ["threads", "2"],
        ["extras"],
        ["gguf", "yes"],
        ["hub", "-"],
    ]


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("bits = 7 [layers] is odd."), 2, "error: bits = 7 [layers] is odd.\n"),
        (BitfloorError("block 3 failed."), 1, "error: block 3 failed.\n"),
        (MemoryError(), 1, "error: out of memory"),
        (ValueError("two\n lines"), 1, "error: unexpected ValueError: two lines; add --debug"),
    ],
)
def test_every_failure_is_one_sentence_and_a_code(
    run: Run, fake: Any, error: Exception, code: int, sentence: str
) -> None:
    fake.plan.side_effect = error
    outcome = run("plan", "M", "--json")
    assert outcome.code == code and outcome.out == ""
    assert outcome.err.startswith(sentence) and outcome.err.count("\n") == 1 and "Traceback" not in outcome.err


@pytest.mark.parametrize("arguments", [("--debug", "plan", "M"), ("plan", "M", "--debug")])
def test_debug_adds_the_traceback_wherever_it_stands(run: Run, fake: Any, arguments: tuple[str, ...]) -> None:
    fake.plan.side_effect = InputError("no.")
    outcome = run(*arguments)
    assert outcome.code == 2 and "Traceback" in outcome.err and outcome.err.endswith("error: no.\n")


@pytest.mark.parametrize(
    ("matrix", "block"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("transformer.h.11.mlp.experts.2.c_fc", "transformer.h.11"),
        ("lm_head", "lm_head"),
    ],
)
def test_the_block_of_a_matrix(matrix: str, block: str) -> None:
    assert block_of(matrix) == block

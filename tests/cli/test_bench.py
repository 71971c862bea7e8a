"""``bitfloor bench``: which of the two is measured, with what, and how it is shown; measuring is tested elsewhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cli.conftest import Run

from bitfloor import benching

RUN = {
    "decoder": "TransformersDecoder",
    "weight_bytes": 2_000_000,
    "bytes_per_token": 1_500_000,
    "prefill_tokens_s": 1234.5,
    "decode_tokens_s": 100.0,
}
MODEL: dict[str, Any] = {
    "model": "m",
    "instruction_set": "avx2",
    "threads": 1,
    "rounds": 3,
    "prompt_tokens": 500,
    "new_tokens": 64,
    "read_gb_s": 10.0,
    "baseline": "random weights",
    "runs": [
        {"name": "float", "dtype": "float32", **RUN, "gb_s": 0.15, "share_of_read": 0.015, "times_half": None},
        {"name": "int8", "dtype": "float32", **RUN, "gb_s": 5.0, "share_of_read": None, "times_half": 2.5},
    ],
    "skipped": {"half": "half precision and the packed model need 14.0 GB of memory and 8.0 GB are available"},
}
PATH = {
    "us": 1.0,
    "median_round_us": 1.0,
    "gb_s": 7.5,
    "share_of_read": 0.75,
    "gweights_s": 1.0,
    "times_bfloat16": 3.25,
}
KERNELS: dict[str, Any] = {
    "instruction_set": "avx2",
    "huge_pages": True,
    "shape": [4096, 11008],
    "rounds": 3,
    "runs": [{"case": "2 bits, g64", "threads": 2, "read_gb_s": 10.0, "int8": PATH, "float": {**PATH, "gb_s": 3.0}}],
}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def bench(folder: Any, *, say: Any, **options: Any) -> dict[str, Any]:
        calls.append((str(folder), options))
        say("round 1 of 3: float")
        return MODEL

    def bench_kernels(*, say: Any, **options: Any) -> dict[str, Any]:
        calls.append(("kernels", options))
        return KERNELS

    monkeypatch.setattr(benching, "bench", bench)
    monkeypatch.setattr(benching, "bench_kernels", bench_kernels)
    return calls


def test_a_folder_is_measured_as_a_model(run: Run, measured: list[Any]) -> None:
    outcome = run("bench", "some/dir", "--threads", 1, "--rounds", 3, "--baseline", "float-model")
    options = {"baseline": "float-model", "prompt_tokens": 512, "new_tokens": 64, "rounds": 3, "threads": 1}
    assert outcome.code == 0 and measured == [("some/dir", options)]
    assert outcome.err == "round 1 of 3: float\n"
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["packed,", "float", "(float32)", "2.00", "MB", "1,234.5", "100.0", "1.50", "MB", "0.15", "2%", "-"] in rows
    assert [
        "packed,",
        "int8",
        "(float32)",
        "2.00",
        "MB",
        "1,234.5",
        "100.0",
        "1.50",
        "MB",
        "5.00",
        "-",
        "2.50x",
    ] in rows
    assert "left out: half precision" in outcome.out and "8.0 GB are available" in outcome.out


def test_the_word_kernels_measures_the_kernels(run: Run, measured: list[Any]) -> None:
    outcome = run("bench", "kernels", "--seconds", 1, "--threads", 2)
    assert outcome.code == 0 and measured == [("kernels", {"threads": 2, "seconds": 1.0, "rounds": 3})]
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["2", "bits,", "g64", "2", "10.0", "7.5", "75%", "3.0", "75%", "3.2x"] in rows
    assert run("bench", "./kernels").code == 0 and measured[-1][0] == "kernels"  # a folder of that name


@pytest.mark.parametrize(("what", "expected"), [("dir", MODEL), ("kernels", KERNELS)])
def test_json_is_one_document(what: str, expected: Any, run: Run) -> None:
    assert json.loads(run("bench", what, "--json").out) == expected


def test_nonsense_is_refused(run: Run, measured: list[Any]) -> None:
    for options in (
        ("kernels", "--baseline", "m"),
        ("dir", "--rounds", 0),
        ("dir", "--threads", 0),
        ("dir", "--threads", 100_000),
        (),
    ):
        outcome = run("bench", *options)
        assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1
    assert measured == []

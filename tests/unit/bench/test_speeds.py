"""Tables of speed, and the one that begins the README's results."""

from __future__ import annotations

from typing import Any

import headline
import pytest
import speeds


def ours(wiki: float, c4: float, bits: float) -> dict[str, Any]:
    scores = {"wiki": {"ppl": wiki}, "c4": {"ppl": c4}}
    return {"perplexity": scores, "bits_per_linear_weight": bits, "quantization": {"cpu_seconds": 99.6}}


def peer(wiki: float, c4: float, **more: Any) -> dict[str, Any]:
    files = {"a": {"file": "wiki.test.raw", "ppl": wiki}, "b": {"file": "c4_unseen.txt", "ppl": c4}}
    return {"evaluation": files, **more}


def test_the_headline_marks_the_best_of_each_width_and_leaves_out_what_was_not_measured() -> None:
    found = headline.headline(
        {
            "yardstick/float": ours(20.0, 27.0, 16.0),
            "yardstick/gptq-w3g64": ours(30.0, 37.0, 3.3),
            "yardstick/bitfloor-w3g64": ours(26.0, 38.0, 3.3),
            "peers/autoround_w3_default": peer(31.0, 36.0, bits_per_linear_weight=3.25, process_cpu_seconds=7.0),
            "peers/w2_asym_mse_gptaq": peer(1234.0, 99.0, bits_per_linear_weight=None, quantize_cpu_seconds=8.0),
        }
    )
    assert found.splitlines()[2:] == [
        "| float | 16 | 20.00 | 27.00 | - |",
        "| 3 bits: auto-round | 3.25 | 31.00 | **36.00** | 7 |",
        "| 3 bits: `gptq-w3g64` | 3.30 | 30.00 | 37.00 | 100 |",
        "| 3 bits: `bitfloor-w3g64` | 3.30 | **26.00** | 38.00 | 100 |",
        "| 2 bits: GPTQModel | - | **1,234** | **99.00** | 8 |",
    ]


def row(name: str, source: str, threads: int, decode: float) -> dict[str, Any]:
    ratios = {"decode": decode, "prefill": 2 * decode}
    return {"name": name, "source": source, "threads": threads, "peer": "p, smollm2-Q2_K.gguf", "ratios": ratios}


def test_speed_beside_llama_cpp_is_that_of_int8() -> None:
    compared = [
        row("native int8", "w4g64", 2, 1.5),
        row("native float", "w4g64", 1, 1.1),
        row("native int8", "x", 1, 2),
    ]
    run = {"threads": 1, "gain": {"int8": 3.0, "float": 1.0}}
    model = {"case": "w1.61", "peer": "IQ1_S", "threads": [run]}
    found = speeds.faster({"decode": {"compared": compared}, "seven": {"models": [model]}})
    assert found.splitlines()[2:] == [
        "| SmolLM2-135M, x | 1 | Q2_K | 2.00 | 4.00 |",
        "| Llama-2-7B's shape, w1.61 | 1 | IQ1_S | 3.00 | - |",
        "| SmolLM2-135M, w4g64 | 2 | Q2_K | 1.50 | 3.00 |",
    ]


def test_memory_is_what_the_imports_do_not_need() -> None:
    sizes = {"linears": 60, "embedding": 20, "head": 0, "other": 0}
    model = {"name": "w", "layers": 2, "bytes": sizes, "cache": 20, "peak": 210, "import_only": 100, "ratio": 1.1}
    assert speeds.resident({"resident": {"models": [model]}}).splitlines()[2].endswith("| 0.00 GB | 1.10 |")


@pytest.mark.parametrize("table", [speeds.kernels, speeds.decode, speeds.seven, speeds.resident, speeds.int8])
def test_a_missing_result_is_named(table: Any) -> None:
    with pytest.raises(SystemExit, match="is missing"):
        table({})

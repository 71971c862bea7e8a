"""The table that begins the README's results: every method by the name of its preset, other tools beside it."""

from __future__ import annotations

from typing import Any

import lowest
from cells import NAMES, Results, markdown, perplexity_cell

# By width: what a row is called, and its result. Peers are those settings of theirs that did best here.
LADDER = {
    "4 bits": (
        ("GPTQModel", "peers/w4_asym_mse"),
        ("auto-round", "peers/autoround_w4_default"),
        ("`gptq-w4g64`", "yardstick/gptq-w4g64"),
        ("`signround-w4g64`", "yardstick/signround-w4g64+calibration.batch_size-4"),
        ("`bitfloor-w4g64`", "yardstick/bitfloor-w4g64"),
    ),
    "3 bits": (
        ("GPTQModel", "peers/w3_asym_mse_desc"),
        ("auto-round", "peers/autoround_w3_default"),
        ("`rtn-w3g64`", "yardstick/rtn-w3g64"),
        ("`slim-llm-w3g64`", "yardstick/slim-llm-w3g64"),
        ("`gptq-w3g64`", "yardstick/gptq-w3g64"),
        ("`signround-w3g64`", "yardstick/signround-w3g64+calibration.batch_size-4"),
        ("`slim-tuned-w3g64`", "yardstick/slim-tuned-w3g64"),
        ("`bitfloor-w3g64`", "yardstick/bitfloor-w3g64"),
    ),
    "2 bits": (
        ("GPTQModel", "peers/w2_asym_mse_gptaq"),
        ("auto-round", "peers/autoround_w2_default"),
        ("auto-round, alg_ext", "peers/autoround_w2_algext"),
        ("`slim-llm-w2g64`", "yardstick/slim-llm-w2g64"),
        ("`omniquant-w2g64`", "yardstick/omniquant-w2g64"),
        ("`slim-llm-plus-w2g64`", "yardstick/slim-llm-plus-w2g64"),
        ("`gptq-w2g64`", "yardstick/gptq-w2g64"),
        ("`signround-w2g64`", "yardstick/signround-w2g64+calibration.batch_size-4"),
        ("`slim-tuned-w2g64`", "yardstick/slim-tuned-w2g64"),
        ("`bitfloor-w2g64`", "yardstick/bitfloor-w2g64"),
    ),
    "1.6 bits": (
        ("`ptq161`, 160 steps", "yardstick/ptq161+method.steps-160"),
        ("`ptq161-restored`, 160 steps", f"yardstick/{lowest.RESTORED}"),
        ("`bitfloor-1.61`", "yardstick/bitfloor-1.61"),
    ),
}


def headline(results: Results) -> str:
    """Perplexities of every method and of other tools, by width."""
    rows = [["float", "16", *scores(results["yardstick/float"]), "-"]]
    for width, methods in LADDER.items():
        found = [(name, results[key]) for name, key in methods if key in results]
        best = [min((perplexity(content, text) for _, content in found), default=0.0) for text in NAMES]
        for name, content in found:
            bits = content.get("bits_per_linear_weight")
            cells = [
                f"**{cell}**" if perplexity(content, text) == least else cell
                for cell, text, least in zip(scores(content), NAMES, best, strict=True)
            ]
            rows.append([f"{width}: {name}", f"{bits:.2f}" if bits else "-", *cells, f"{cpu_seconds(content):.0f}"])
    return markdown(["", "stored bits per linear weight", *NAMES.values(), "CPU-seconds"], rows)


def perplexity(content: dict[str, Any], text: str) -> float:
    """Of a result of ours or of a peer."""
    if "perplexity" in content:
        return float(content["perplexity"][text]["ppl"])
    return float(next(entry["ppl"] for entry in content["evaluation"].values() if text in entry["file"]))


def scores(content: dict[str, Any]) -> list[str]:
    """Both perplexities as cells."""
    return [perplexity_cell(perplexity(content, text)) for text in NAMES]


def cpu_seconds(content: dict[str, Any]) -> float:
    """What quantizing took."""
    own = content.get("quantization")
    return float(own["cpu_seconds"] if own else content.get("process_cpu_seconds", content.get("quantize_cpu_seconds")))

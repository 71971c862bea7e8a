"""Tables of speed and of memory while running: kernels, a small model, a model of 7B's shape, int8 activations."""

from __future__ import annotations

from typing import Any

from cells import NAMES, Results, difference_cell, markdown, needed, perplexity_cell

FILE_TYPES = ("Q4_1", "Q4_0", "Q3_K", "Q2_K")


def kernels(results: Results) -> str:
    """Packed matrix-vector products of 4096 x 11008 from main memory."""
    rows = []
    for run in needed(results, "kernels")["runs"]:
        whole, exact = run["int8"], run["float"]
        rows.append(
            [
                run["case"],
                str(run["threads"]),
                f"{run['read_gb_s']:.0f}",
                f"{whole['share_of_read']:.0%}",
                f"{exact['share_of_read']:.0%}",
                f"{whole['times_bfloat16']:.1f}",
                f"{exact['times_bfloat16']:.1f}",
                f"{16 / run['bits']:.1f}",
            ]
        )
    headings = ["", "threads", "read loop, GB/s", "int8, share of it", "float, share of it"]
    return markdown([*headings, "int8, times bfloat16", "float, times bfloat16", "16 / bits"], rows)


def decode(results: Results) -> str:
    """SmolLM2-135M: tokens a second of every contestant."""
    rows = []
    for row in needed(results, "decode")["rows"]:
        products = row.get("products")
        rows.append(
            [
                contestant(row),
                f"{row['bytes'] / 1e6:.0f} MB",
                str(row["threads"]),
                f"{row['prefill']['tokens_s']:.0f}",
                f"{row['decode']['tokens_s']:.0f}",
                f"{row['decode']['ms']:.2f}",
                f"{products['ms']:.2f}" if products else "-",
            ]
        )
    headings = ["", "files", "threads", "prompt, tokens/s", "answer, tokens/s", "ms a token"]
    return markdown([*headings, "products alone, ms"], rows)


def contestant(row: dict[str, Any]) -> str:
    """What was run, in words."""
    if row["name"] == "llama.cpp":
        return f"llama.cpp, {next(kind for kind in FILE_TYPES if kind in row['source'])}"
    if row["name"] in ("bfloat16", "float16"):
        return f"transformers, {row['name']}"
    if row["name"].startswith("eager"):
        return f"transformers on the packed folder {row['source']}"
    return f"bitfloor, {row['source']}, {row['name'].split()[-1]} activations"


def seven(results: Results) -> str:
    """A model of Llama-2-7B's shape, random weights."""
    rows = []
    for model in needed(results, "seven")["models"]:
        for run in model["threads"]:
            seconds = run["seconds"]
            for mode in ("int8", "float"):
                rows.append(
                    [
                        f"{model['case']}, {mode}",
                        f"{model['token_bytes'] / 1e9:.2f} GB",
                        str(run["threads"]),
                        f"{1 / seconds[mode]:.2f}",
                        f"{run['share'][mode]:.0%}",
                        f"{model['peer']}, {model['peer_bytes'] / 1e9:.2f} GB",
                        f"{1 / seconds['llama.cpp']:.2f}",
                        f"{run['gain'][mode]:.2f}",
                        f"{model['target']:.1f}",
                    ]
                )
    headings = ["", "read for a token", "threads", "tokens/s", "of the read loop's", "llama.cpp's file", "its tokens/s"]
    return markdown([*headings, "times its speed", "aimed at"], rows)


def resident(results: Results) -> str:
    """Peak memory of loading and running."""
    rows = []
    for model in needed(results, "resident")["models"]:
        rows.append(
            [
                f"{model['name']}, {model['layers']} layers of LLaMA-7B's width",
                f"{sum(model['bytes'].values()) / 1e9:.2f} GB",
                f"{model['cache'] / 1e9:.2f} GB",
                f"{(model['peak'] - model['import_only']) / 1e9:.2f} GB",
                f"{model['ratio']:.2f}",
            ]
        )
    return markdown(["", "packed", "key-value cache", "peak, imports taken off", "of what must be held"], rows)


def int8(results: Results) -> str:
    """What rounding activations costs."""
    rows = []
    for row in needed(results, "int8")["rows"]:
        for text, found in row["texts"].items():
            nats = {"delta_nll": found["nats"]["delta"], "ci95": found["nats"]["ci95"]}
            cells = [perplexity_cell(found["float"]), perplexity_cell(found["int8"])]
            rows.append([f"{row['preset']}, {NAMES[text]}", *cells, f"{found['rise']:+.2%}", difference_cell(nats)])
    return markdown(["", "float activations", "int8", "perplexity", "Δ nats/token [95%]"], rows)


def faster(results: Results) -> str:
    """Decoding with int8 activations beside llama.cpp, which rounds them too: a small model, and one of 7B's shape."""
    rows = []
    compared = needed(results, "decode")["compared"]
    for row in sorted(compared, key=lambda row: (row["threads"], row["source"]), reverse=True):
        if row["name"] == "native int8":
            peer = next(kind for kind in FILE_TYPES if kind in row["peer"])
            speeds = [f"{row['ratios'][what]:.2f}" for what in ("decode", "prefill")]
            rows.append([f"SmolLM2-135M, {row['source']}", str(row["threads"]), peer, *speeds])
    for model in needed(results, "seven")["models"]:
        for run in model["threads"]:
            name = f"Llama-2-7B's shape, {model['case']}"
            rows.append([name, str(run["threads"]), model["peer"], f"{run['gain']['int8']:.2f}", "-"])
    rows.sort(key=lambda row: int(row[1]))
    return markdown(["", "threads", "llama.cpp's file", "decoding, times its speed", "reading a prompt"], rows)

"""Tables of PTQ1.61: what it stores, and what other types of its size leave of a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from cells import NAMES, Results, markdown, needed, perplexity_cell

# Rows of the table of perplexities below two bits, with the results they are made from.
RESTORED = "ptq161-restored+method.steps-160+restore.mode-packed+restore.seqlen-256"
LADDER = (
    ("one bit throughout, nothing learned", "ptq161+method.steps-0+method.ratio-0"),
    ("mask of random channels, nothing learned", "ptq161+method.steps-0+method.score-random"),
    ("mask by activations, nothing learned", "ptq161+method.steps-0"),
    ("mask of random channels, 160 steps", "ptq161+method.steps-160+method.score-random"),
    ("mask by activations, 160 steps, squared error alone", "ptq161+method.steps-160+method.cosine-false"),
    ("mask by activations, 160 steps, with the cosine term", "ptq161+method.steps-160"),
    ("the same, restored before", RESTORED),
    ("`ptq161`: 640 steps", "ptq161"),
    ("`ptq161-restored`", "ptq161-restored"),
    ("OmniQuant by whole rows, 2 bits", "omniquant-w2g64+spec.group_size--1"),
    ("SignRound, 2 bits, groups of 64", "signround-w2g64+calibration.batch_size-4"),
    ("`bitfloor-1.61`", "bitfloor-1.61"),
)


def shapes(results: Results) -> str:
    """A block of LLaMA-7B in a real file, beside the plan and the formula."""
    block = needed(results, "shapes")["block"]
    rows = []
    for row in block["matrices"]:
        high, wide = row["shape"]
        sizes = [f"{row[kind]:,}" for kind in ("file", "plan", "formula")]
        rows.append(
            [row["name"], f"{high} x {wide}", str(row["salient"]), *sizes, f"{8 * row['file'] / high / wide:.4f}"]
        )
    sums = [f"{sum(row[kind] for row in block['matrices']):,}" for kind in ("file", "plan", "formula")]
    rows.append(["the block", "-", "-", *sums, f"{block['bits_per_linear_weight']:.4f}"])
    return markdown(["", "shape", "salient", "bytes in the file", "`plan`", "formula", "bits a weight"], rows)


def multiples(results: Results) -> str:
    """The formula for single matrices, by what the number of salient channels is a multiple of."""
    found = needed(results, "shapes")["shapes"]
    rows: dict[str, list[str]] = {}
    for row in found:
        high, wide = row["shape"]
        cells = rows.setdefault(f"{high} x {wide}", [f"{high} x {wide}"])
        cells += [str(row["salient"]), f"{row['bytes']:,}", f"{8 * row['bytes'] / high / wide:.4f}"]
    headings = ["matrix `O x I`"]
    for multiple in dict.fromkeys(row["multiple"] for row in found):
        headings += [f"salient, in {multiple}s", "bytes", "bits a weight"]
    return markdown(headings, rows.values())


def iq1(results: Results) -> str:
    """Single matrices by PTQ1.61 and by llama.cpp's smallest types: bytes, and the output's error on unseen text."""
    matrices = needed(results, "iq1")["matrices"]
    headings = ["", "bytes", "bits a weight"]
    rows: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["name"] for matrix in matrices for row in matrix["rows"]):
        own = [row for matrix in matrices for row in matrix["rows"] if row["name"] == name]
        sizes = [row["bytes"] for row in own]
        bits = [row["bits_per_weight"] for row in own]
        rows[name] = [name, _range(sizes, ",d"), _range(bits, ".4f")]
    for matrix in matrices:
        found = {row["name"]: row for row in matrix["rows"]}
        block = next(word for word in matrix["name"].split(".") if word.isdecimal())
        headings += [f"block {block}: {NAMES['c4']}", NAMES["wiki"]]
        for name, cells in rows.items():
            told = found.get(name)
            cells += [f"{told['error_c4']:.4f}", f"{told['error_wiki']:.4f}"] if told else ["-", "-"]
    return markdown(headings, rows.values())


def lowest(results: Results) -> str:
    """PTQ1.61 part by part, and what else takes so few bits."""
    rows = []
    for label, name in LADDER:
        content = results.get(f"yardstick/{name}")
        if content is not None:
            cells = [perplexity_cell(content["perplexity"][text]["ppl"]) for text in NAMES]
            bits = [f"{content['bits_per_linear_weight']:.4f}", f"{content['bits_per_parameter']:.2f}"]
            rows.append([label, *bits, *cells, f"{content['quantization']['cpu_seconds']:.0f}"])
    headings = ["", "stored bits per linear weight", "per parameter", *NAMES.values(), "CPU-seconds"]
    return markdown(headings, rows)


def _range(values: Sequence[float], form: str) -> str:
    """One number if they are all the same, else the least and the largest."""
    ends = dict.fromkeys((min(values), max(values)))
    return " to ".join(format(value, form) for value in ends)


def parts(results: Results) -> str:
    """Bytes of one such matrix by what they are."""
    found = needed(results, "iq1")["matrices"][0]["rows"]
    names = list(dict.fromkeys(name for row in found for name in row["parts"]))
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in found:
        cells = (*(f"{row['parts'][name]:,}" if name in row["parts"] else "-" for name in names), f"{row['bytes']:,}")
        rows.setdefault(cells, []).append(row["name"].partition(",")[0])
    told = [[", ".join(dict.fromkeys(owners)), *cells] for cells, owners in rows.items()]
    return markdown(["", *names, "in all"], told)

"""Tables of PTQ1.61: what it stores."""

from __future__ import annotations

from cells import Results, markdown, needed


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

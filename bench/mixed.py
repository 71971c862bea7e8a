"""Tables of widths by group, and of what they are measured against."""

from __future__ import annotations

from cells import NAMES, Results, difference_cell, markdown, needed, perplexity_cell

# Rows of the table of mixed precision, with the results they are made from, for width {b}.
MIXED = (
    ("RTN, min-max", "rtn-minmax-w{b}g64"),
    ("GPTQ, min-max", "slim-llm-w{b}g64+method.range-minmax+allocation-null"),
    ("GPTQ + SBA", "slim-llm-w{b}g64+method.range-minmax"),
    ("GPTQ + SQC (the published ranges)", "slim-llm-w{b}g64+allocation-null"),
    ("SliM-LLM (both)", "slim-llm-w{b}g64"),
    ("GPTQ, searched ranges and correction", "gptq-w{b}g64"),
    ("OmniQuant", "omniquant-w{b}g64"),
    ("SliM-LLM+", "slim-llm-plus-w{b}g64"),
    ("SignRound", "signround-w{b}g64+calibration.batch_size-4"),
    ("SBA + SignRound", "signround-w{b}g64+calibration.batch_size-4+allocation.policy-sba+allocation.sequences-32"),
    ("bitfloor", "bitfloor-w{b}g64"),
    ("slim-tuned", "slim-tuned-w{b}g64"),
    ("budget + bitfloor", "bitfloor-w{b}g64+allocation.policy-budget+allocation.sequences-32"),
    (
        "budget, channels sorted + bitfloor",
        "bitfloor-w{b}g64+allocation.policy-budget+allocation.sequences-32+allocation.sort-true",
    ),
    ("bitfloor, embedding at 8 bits", "bitfloor-w{b}g64+embedding8"),
    ("bitfloor-mixed (budget with embedding, sorted)", "bitfloor-mixed-w{b}g64+embedding8"),
    ("bitfloor, zero among the levels", "bitfloor-w{b}g64+spec.centred-0"),
    ("slim-tuned, zero among the levels", "slim-tuned-w{b}g64+spec.centred-0"),
    ("bitfloor, embedding at 8 bits, zero among the levels", "bitfloor-w{b}g64+embedding8+spec.centred-0"),
    (
        "bitfloor-mixed, zero among the levels, head to nearest",
        "bitfloor-mixed-w{b}g64+embedding8+spec.centred-0+head.rounding-nearest",
    ),
)


def slim(results: Results) -> str:
    """Everything with widths by group, and what it is measured against."""
    rows = []
    for bits in (2, 3):
        for label, name in MIXED:
            content = results.get(f"yardstick/{name.format(b=bits)}")
            if content is None:
                continue
            cells = [perplexity_cell(content["perplexity"][text]["ppl"]) for text in NAMES]
            size = f"{content['bytes']['total'] / 1e6:.1f} MB"
            cost_of = f"{content['quantization']['cpu_seconds']:.0f}"
            rows.append([f"{label}, {bits} bits", f"{content['bits_per_linear_weight']:.3f}", size, *cells, cost_of])
    headings = ["", "stored bits per linear weight", "file", *NAMES.values(), "CPU-seconds"]
    return markdown(headings, rows)


def gains(results: Results) -> str:
    """What widths by group are worth, against the same recipe without them."""
    rows = [
        [
            f"{row['mixed']} to {row['plain']}, {NAMES[row['text']]}",
            f"{row['mixed_bytes'] / 1e6:.2f} / {row['plain_bytes'] / 1e6:.2f} MB",
            f"{row['ratio']:.3f}",
            difference_cell(row),
        ]
        for row in needed(results, "comparison")["mixed"]
    ]
    return markdown(["", "files", "ratio of perplexities", "Δ nats/token [95%]"], rows)


def second(results: Results) -> str:
    """The same on a model made to differ."""
    content = needed(results, "second")
    rows = [
        [f"{row['name']}, {row['bits']} bits", f"{row['bits_per_linear_weight']:.3f}", f"{row['ppl']:.3f}"]
        for row in content["rows"]
    ]
    return markdown(["", "stored bits per linear weight", f"perplexity (float {content['float']:.3f})"], rows)


def averages(results: Results) -> str:
    """What a budget promises and what is stored."""
    rows = [
        [
            f"{row['average']:g}",
            "sorted" if row["sort"] else "as they are",
            f"{row['promised']:.4f}",
            f"{row['stored']:.4f}",
            f"{row['gap']:.2e}",
        ]
        for row in needed(results, "averages")["rows"]
    ]
    return markdown(["mean width", "channels", "promised", "stored", "gap"], rows)


def clipping(results: Results) -> str:
    """Learned clipping on one block, and its published schedule."""
    rows = []
    for family in ("clipping", "published"):
        for key, content in results.items():
            if key.startswith(f"ablation/{family}-"):
                for row in content["variants"]:
                    errors = [f"{row[f'error_{text}']:.4f}" for text in ("calibration", "c4", "wiki")]
                    divergences = [f"{row['kl_c4']:.4f}", f"{row['kl_wiki']:.4f}"]
                    rows.append([row["name"], f"{row['cpu_seconds']:.0f}", *errors, *divergences])
    headings = ["", "CPU-seconds", "error, calibration", "C4", "WikiText-2", "KL, C4", "KL, WikiText-2"]
    return markdown(headings, rows)

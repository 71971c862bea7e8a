"""Put the measured numbers into the documents, and refuse numbers that no longer describe the code.

    python bench/tables.py           rewrite what stands between the markers
    python bench/tables.py --check   exit 1 if that would change anything, or if a result is stale

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``; ``--list`` names the tables there are.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import record
from cells import NAMES, Results, difference_cell, markdown, needed, perplexity_cell
from headline import headline, scores
from lowest import iq1, lowest, multiples, parts, shapes
from mixed import averages, clipping, gains, second, slim
from speeds import decode, faster, int8, kernels, resident, seven

MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table:(?P=name) -->)", re.DOTALL)
FLOAT_EMBEDDING = 16


# -- tables -----------------------------------------------------------------------------------------------------------


def yardstick(results: Results) -> str:
    """Every preset with the embedding left at 16 bits, as the peers leave it."""
    return _yardstick(results, lambda bits: bits == FLOAT_EMBEDDING)


def shipped(results: Results) -> str:
    """Every preset as it is shipped, the embedding quantized too."""
    return _yardstick(results, lambda bits: bits != FLOAT_EMBEDDING)


def _yardstick(results: Results, wanted: Callable[[int], bool]) -> str:
    import compare

    models = {key.split("/", 1)[1]: content for key, content in results.items() if key.startswith("yardstick/")}
    exact = models.pop("float", None)
    base = compare.our_scores(exact) if exact else {}
    chosen = sorted(
        (content for content in models.values() if wanted(content["embedding_bits"])),
        key=lambda content: (-content["bits_per_linear_weight"], content["name"]),
    )
    texts = list(NAMES)
    headings = ["method", "bits per linear weight", "bits per parameter", "size"]
    for text in texts:
        headings += [f"{NAMES[text]} perplexity", "Δ nats/token to float [95%]"]
    rows = []
    for content in [*([exact] if exact else []), *chosen]:
        scores = compare.our_scores(content)
        row = [
            content["name"],
            f"{content['bits_per_linear_weight']:.2f}",
            f"{content['bits_per_parameter']:.2f}",
            f"{content['bytes']['total'] / 1e6:.1f} MB",
        ]
        for text in texts:
            versus = compare.difference(scores[text], base[text]) if base and content is not exact else None
            row += [perplexity_cell(scores[text].value), difference_cell(versus)]
        cost = content.get("quantization")
        rows.append([*row, f"{cost['cpu_seconds']:.0f}" if cost else "-"])
    return markdown([*headings, "CPU-seconds"], rows)


def peers(results: Results) -> str:
    """Results here against every setting of the peer."""
    rows = []
    for row in needed(results, "comparison")["peers"]:
        rows.append(
            [
                f"{row['ours']}, {NAMES[row['text']]}",
                perplexity_cell(row["our_ppl"]),
                row["peer_tool"] + (" (strongest)" if row["strongest"] else ""),
                settings_cell(row["peer_settings"]),
                perplexity_cell(row["peer_ppl"]),
                difference_cell(row),
                "yes" if row["not_worse"] else "not shown",
                cost_cell(row),
            ]
        )
    headings = ["", "bitfloor", "peer", "its settings", "its perplexity", "Δ nats/token, ours minus its [95%]"]
    return markdown([*headings, "not worse", "CPU-seconds, ours / its"], rows)


def cost_cell(row: Mapping[str, Any]) -> str:
    """What both took, and the quotient."""
    ours, theirs = row["our_cpu_seconds"], row["peer_cpu_seconds"]
    return f"{ours:.0f} / {theirs:.0f} = {ours / theirs:.2f}" if theirs else f"{ours:.0f} / -"


def settings_cell(settings: Mapping[str, Any]) -> str:
    """The settings of a peer that were not left off, in a few words."""
    words = ["sym" if settings.get("sym") else "asym"]
    words += [name for name in ("desc_act", "act_group_aware", "static_groups") if settings.get(name)]
    words += ["alg_ext"] if settings.get("enable_alg_ext") else []
    for name in ("mse", "gptaq_alpha", "damp_percent", "iters"):
        if settings.get(name):
            words.append(f"{name}={settings[name]:g}")
    if settings.get("lr") and settings["lr"] != 1 / settings["iters"]:
        words.append(f"lr={settings['lr']:g}")
    return ", ".join(words)


def ranges(results: Results) -> str:
    """Searched ranges against minimum and maximum, both rounded to nearest."""
    rows = [
        [
            f"W{row['bits']} {NAMES[row['text']]}",
            perplexity_cell(row["minmax_ppl"]),
            perplexity_cell(row["search_ppl"]),
            f"{row['percent_below']:.1f}%",
            difference_cell(row),
        ]
        for row in needed(results, "comparison")["range_search"]
    ]
    return markdown(["", "min-max", "searched", "lower by", "Δ nats/token [95%]"], rows)


def memory(results: Results) -> str:
    """Peak memory by depth, and what was predicted."""
    rows = [
        [
            f"{model['layers']} layers",
            f"{model['checkpoint_bytes'] / 1e9:.2f} GB",
            f"{model['peak_rss_bytes'] / 1e9:.2f} GB",
            f"{model['planned_bytes'] / 1e9:.2f} GB",
            f"{model['planned_bytes'] / model['peak_rss_bytes'] - 1:+.1%}",
        ]
        for model in needed(results, "memory")["models"]
    ]
    return markdown(["", "checkpoint", "peak memory of quantizing it", "`plan` said", "error"], rows)


def determinism(results: Results) -> str:
    """Kills and what came of them."""
    found = needed(results, "determinism")
    kills = found["kill_trials"]
    stages = ", ".join(f"{count} {stage}" for stage, count in sorted(kills["landed"]["by_stage"].items()))
    rows = [
        [f"two runs, {threads} thread(s)", "same bytes" if pair["same"] else "**different**"]
        for threads, pair in found["runs"].items()
    ]
    bad = kills["sequences_with_other_bytes"]
    outcome = "same bytes" if not bad else f"**{bad} of {kills['sequences']} different**"
    where = f"{stages}; {kills['landed']['inside_a_write']} inside a write"
    rows.append([f"{kills['kills']} kills in {kills['sequences']} runs ({where})", outcome])
    return markdown(["", "outcome"], rows)


def ablation(results: Results) -> str:
    """Variants on one block: what quantizing it costs, and the divergence of the whole model on unseen text."""
    return _variants({key: value for key, value in results.items() if key.startswith("ablation/block")})


def seeds(results: Results) -> str:
    """SignRound here and in auto-round, the same settings with batches in other orders."""
    rows = []
    for key, content in results.items():
        ours = re.fullmatch(r"yardstick/(signround-w\dg64)\+calibration\.batch_size-4(\+seed-(\d+))?", key)
        theirs = re.fullmatch(r"peers/autoround_w(\d)_default(_seed\d+)?", key)
        if ours:
            rows.append([ours[1], f"bitfloor, seed {ours[3] or 0}", *scores(content)])
        elif theirs:
            name = f"auto-round, seed {content.get('seed', 42)}"
            rows.append([f"signround-w{theirs[1]}g64", name, *scores(content)])
    return markdown(["same settings", "", *NAMES.values()], sorted(rows))


def block(results: Results) -> str:
    """One block by auto-round and by methods here, from the same inputs, judged on text that calibrated neither."""
    rows = []
    for key, content in results.items():
        if not key.startswith("block/"):
            continue
        base = content["errors"][0]
        for row in content["errors"]:
            rows.append(
                [
                    f"W{content['bits']}, block {content['block']}: {row['name']}",
                    f"{row['cpu_seconds']:.1f}",
                    f"{row['cpu_seconds'] / base['cpu_seconds']:.2f}",
                    *(f"{row[name]:.4f}" for name in ("error_c4", "error_wiki", "kl_c4", "kl_wiki")),
                ]
            )
        for name, seconds in content.get("cost", {}).get("cpu_seconds", {}).items():
            middle = statistics.median(seconds)
            theirs = statistics.median(content["cost"]["cpu_seconds"]["auto-round"])
            told = f"W{content['bits']}, {content['cost']['steps']} steps of a block and nothing else: {name}"
            rows.append([told, f"{middle:.1f}", f"{middle / theirs:.2f}", *["-"] * 4])
    headings = ["", "CPU-seconds", "of auto-round's", "error, C4", "error, WikiText-2", "KL, C4", "KL, WikiText-2"]
    return markdown(headings, rows)


def wider(results: Results) -> str:
    """Windows of two blocks, and losses that weigh channels."""
    return _variants({key: value for key, value in results.items() if key.startswith("ablation/wider")})


def _variants(found: Results) -> str:
    if not found:
        raise SystemExit("bench/results/ablation is empty; docs/measuring.md says how it is made")
    chosen = sorted(found.values(), key=lambda content: (content["bits"], content["block"]))
    headings, names = [""], list(dict.fromkeys(row["name"] for content in chosen for row in content["variants"]))
    cells: dict[str, list[str]] = {name: [name] for name in names}
    for content in chosen:
        where = f"block {content['block']}, W{content['bits']}"
        headings += [f"{where}: CPU-seconds", "KL, C4", "KL, WikiText-2"]
        rows = {row["name"]: row for row in content["variants"]}
        for name in names:
            row = rows.get(name)
            told = [f"{row['cpu_seconds']:.1f}", f"{row['kl_c4']:.4f}", f"{row['kl_wiki']:.4f}"] if row else ["-"] * 3
            cells[name] += told
    return markdown(headings, cells.values())


TABLES: dict[str, Callable[[Results], str]] = {
    "headline": headline,
    "yardstick": yardstick,
    "shipped": shipped,
    "peers": peers,
    "ranges": ranges,
    "memory": memory,
    "determinism": determinism,
    "ablation": ablation,
    "wider": wider,
    "slim": slim,
    "gains": gains,
    "second": second,
    "clipping": clipping,
    "averages": averages,
    "seeds": seeds,
    "block": block,
    "shapes": shapes,
    "multiples": multiples,
    "iq1": iq1,
    "parts": parts,
    "lowest": lowest,
    "faster": faster,
    "kernels": kernels,
    "decode": decode,
    "seven": seven,
    "resident": resident,
    "int8": int8,
}
# Documents with marked tables.
METHODS = record.ROOT / "docs" / "methods"
DOCUMENTS = (
    record.ROOT / "README.md",
    METHODS / "bitfloor.md",
    METHODS / "signround.md",
    METHODS / "slim-llm.md",
    METHODS / "ptq161.md",
    METHODS.parent / "allocation.md",
    METHODS.parent / "speed.md",
    METHODS.parent / "results.md",
)


# -- the document -----------------------------------------------------------------------------------------------------


def load_results(folder: Path) -> Results:
    """Every result by its path below the folder without suffix: ``yardstick/gptq-w2g64``."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): record.read_result(path)
        for path in sorted(folder.rglob("*.json"))
    }


def render(text: str, results: Results) -> str:
    """The document with every marked table made anew.

    Raises:
        SystemExit: an unknown table, a marker without its end, or no marker at all.
    """
    opened = re.findall(r"<!-- table:([\w-]+) -->", text)
    closed = [match["name"] for match in MARKED.finditer(text)]
    if opened != closed:
        raise SystemExit(f"the table markers do not match: {', '.join(opened)} are opened, {', '.join(closed)} closed")
    unknown = [name for name in opened if name not in TABLES]
    if unknown or not opened:
        raise SystemExit(f"{unknown[0]!r} is no table" if unknown else "there is no table marker in the document")
    return MARKED.sub(lambda match: match[1] + TABLES[match["name"]](results) + match[4], text)


def stale_results(folder: Path) -> list[str]:
    """Sentences about results that no longer describe the code."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        reason = record.stale(path)
        if reason:
            found.append(f"{path.relative_to(folder).as_posix()} is stale: {reason}")
    comparison = folder / "comparison.json"
    if comparison.is_file():
        there = {
            p.relative_to(folder).as_posix() for part in ("yardstick", "peers") for p in (folder / part).glob("*.json")
        }
        new = sorted(there - set(record.read_result(comparison)["inputs"]))
        if new:
            found.append(f"comparison.json is stale: {new[0]} came after it; run python bench/compare.py")
    return found


def main() -> None:
    """Render or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    parser.add_argument("--list", action="store_true", help="name the tables and stop")
    parser.add_argument(
        "--file", type=Path, action="append", help="a document; default: README.md and docs/methods/bitfloor.md"
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    if args.list:
        sys.stdout.write("".join(f"{name}: {make.__doc__}\n" for name, make in TABLES.items()))
        return
    complaints = stale_results(args.results)
    results = load_results(args.results)
    for document in args.file or DOCUMENTS:
        text = document.read_text("utf-8")
        made = render(text, results)
        if made == text:
            continue
        if args.check:
            complaints.append(f"{document.name} is not what the results give; run python bench/tables.py")
        else:
            document.write_text(made, "utf-8")
    for complaint in complaints:
        sys.stderr.write(complaint + "\n")
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()

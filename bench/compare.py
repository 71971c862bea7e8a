"""Compare what was measured: methods here against other software, searched against min-max ranges, on the same tokens.

    python bench/compare.py

Reads ``bench/results/yardstick`` and ``bench/results/peers``, writes ``bench/results/comparison.json``. Nothing is run.
Differences are paired, window by window, with a 95% interval (docs/evaluation.md); "not worse" means that the whole
interval lies below +0.01 nats a token. Results of different tokens are refused.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import record

GROUP = 64
# Which software a result here is measured against: what makes the same kind of thing, under the same settings.
CONTESTS = (
    ("gptqmodel", "gptq-w{bits}g{group}"),
    ("auto-round", "signround-w{bits}g{group}+calibration.batch_size-4"),
    ("auto-round", "bitfloor-w{bits}g{group}"),
    ("auto-round", "bitfloor-tuned-w{bits}g{group}"),
    ("auto-round", "bitfloor-w{bits}g{group}+sequences-64+method.steps-0"),
    ("auto-round", "bitfloor-fast-w{bits}g{group}+sequences-16"),
)
# What is here as published meets the same there: auto-round's extension is another algorithm.
PLAIN = "signround-"
SETTINGS = (
    "sym",
    "desc_act",
    "act_group_aware",
    "static_groups",
    "mse",
    "damp_percent",
    "gptaq_alpha",
    "iters",
    "lr",
    "enable_alg_ext",
)


def load_ours(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of the yardstick by name."""
    return {path.stem: record.read_result(path) for path in sorted(folder.glob("*.json"))}


def load_peers(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of other software by file name, those that were scored."""
    found = {path.stem: record.read_result(path) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in found.items() if content.get("evaluation")}


def our_scores(content: Mapping[str, Any]) -> dict[str, Any]:
    """``PerplexityResult`` by text of a yardstick result."""
    return {name: _score(e, e["nll_per_window"], e["seqlen"]) for name, e in content["perplexity"].items()}


def peer_scores(content: Mapping[str, Any]) -> list[Any]:
    """``PerplexityResult`` of each text of a peer's result; they are matched by tokens, not by name."""
    entries = content["evaluation"].values()
    return [_score(entry, entry["window_mean_nll"], entry["window_tokens"]) for entry in entries]


def _score(entry: Mapping[str, Any], losses: Iterable[float], seqlen: int) -> Any:
    from bitfloor.evaluation.perplexity import PerplexityResult

    losses = tuple(losses)
    count = len(losses)
    if count != entry["windows"]:
        raise SystemExit(f"a result has {count} losses for {entry['windows']} windows; measure it again")
    # The hash in which the peers' results are kept; ours have it beside their own.
    return PerplexityResult(entry["ppl"], losses, count * (seqlen - 1), count, seqlen, entry["ids_sha256"])


def difference(candidate: Any, baseline: Any) -> dict[str, Any]:
    """The paired difference and what it shows."""
    from bitfloor.evaluation.paired import not_worse, paired_difference

    found = paired_difference(candidate, baseline)
    interval = None if found.ci95 is None else list(found.ci95)
    return {"delta_nll": found.delta_nll, "ci95": interval, "not_worse": not_worse(found)}


def against_peers(ours: Mapping[str, Any], peers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each contest at each width against every setting of the peer at that width, on every text both were scored on.

    ``strongest`` marks the setting with the lowest perplexity on that text.
    """
    rows: list[dict[str, Any]] = []
    for (tool, pattern), bits in itertools.product(CONTESTS, (4, 3, 2)):
        name = pattern.format(bits=bits, group=GROUP)
        if name not in ours:
            continue
        kind = (tool, bits, GROUP)
        # Runs with another seed are there to show how far one setting scatters (table "seeds").
        rivals = {k: p for k, p in peers.items() if (p["tool"], p.get("bits"), p.get("group_size")) == kind}
        rivals = {key: peer for key, peer in rivals.items() if peer.get("seed") is None}
        if pattern.startswith(PLAIN):
            rivals = {key: peer for key, peer in rivals.items() if not peer["settings"].get("enable_alg_ext")}
        for text, own in our_scores(ours[name]).items():
            found = [
                _row(ours[name], own, key, peer, other)
                for key, peer in rivals.items()
                for other in peer_scores(peer)
                if other.token_sha256 == own.token_sha256
            ]
            best = min((row["peer_ppl"] for row in found), default=None)
            rows += [{"bits": bits, "text": text, **row, "strongest": row["peer_ppl"] == best} for row in found]
    return rows


def _row(content: Mapping[str, Any], own: Any, key: str, peer: Mapping[str, Any], other: Any) -> dict[str, Any]:
    calibration = content["calibration"] or {}
    return {
        "ours": content["name"],
        "our_ppl": own.value,
        "our_bits": content["bits_per_linear_weight"],
        "our_cpu_seconds": content["quantization"]["cpu_seconds"],
        "peer": key,
        "peer_tool": f"{peer['tool']} {peer['versions'].get(peer['tool'], '')}".strip(),
        "peer_settings": {name: peer["settings"].get(name) for name in SETTINGS},
        "peer_bits": peer.get("bits_per_linear_weight"),
        "peer_cpu_seconds": peer.get("process_cpu_seconds", peer.get("quantize_cpu_seconds")),
        "peer_ppl": other.value,
        "same_calibration_tokens": calibration.get("ids_sha256") == peer["calibration"]["ids_sha256"],
        **difference(own, other),
    }


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By result and text: against how many settings, and against the strongest, it is shown to be not worse."""
    grouped: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["ours"], row["bits"], row["text"]), []).append(row)
    return [
        {
            "ours": ours,
            "bits": bits,
            "text": text,
            "settings": len(group),
            "not_worse_than": sum(row["not_worse"] for row in group),
            "strongest": next(row["peer"] for row in group if row["strongest"]),
            "not_worse_than_strongest": all(row["not_worse"] for row in group if row["strongest"]),
        }
        for (ours, bits, text), group in grouped.items()
    ]


def search_gain(ours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How far the searched ranges are below min-max ones, in percent of the latter's perplexity."""
    rows = []
    for bits in (4, 3, 2):
        searched, plain = (ours.get(f"{method}-w{bits}g{GROUP}") for method in ("rtn", "rtn-minmax"))
        if searched is None or plain is None:
            continue
        for text, score in our_scores(searched).items():
            base = our_scores(plain)[text]
            percent = 100 * (1 - score.value / base.value)
            row = {"bits": bits, "text": text, "search_ppl": score.value, "minmax_ppl": base.value}
            rows.append({**row, "percent_below": percent, **difference(score, base)})
    return rows


WITH_ZERO = "+spec.centred-0"
# What widths by group are worth: a recipe with them, and the one that they are measured against.
MIXED = (
    ("slim-llm-w{b}g64", "slim-llm-w{b}g64+allocation-null"),
    ("slim-tuned-w{b}g64", "bitfloor-w{b}g64"),
    ("bitfloor-w{b}g64+allocation.policy-budget+allocation.sequences-32+allocation.sort-true", "bitfloor-w{b}g64"),
    ("bitfloor-mixed-w{b}g64+embedding8", "bitfloor-w{b}g64+embedding8"),
    # And both sides with zero among the levels, the head rounded to nearest.
    (f"slim-tuned-w{{b}}g64{WITH_ZERO}", f"bitfloor-w{{b}}g64{WITH_ZERO}"),
    (
        f"bitfloor-mixed-w{{b}}g64+embedding8{WITH_ZERO}+head.rounding-nearest",
        f"bitfloor-w{{b}}g64+embedding8{WITH_ZERO}",
    ),
    ("bitfloor-w{b}g64", f"bitfloor-w{{b}}g64{WITH_ZERO}"),
)


def mixed_gain(ours: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipes with widths by group beside their own without, where both are there."""
    rows = []
    for bits in (2, 3):
        for pair in MIXED:
            names = [name.format(b=bits) for name in pair]
            mixed, plain = (ours.get(name) for name in names)
            if mixed is None or plain is None:
                continue
            for text, score in our_scores(mixed).items():
                base = our_scores(plain)[text]
                row = {"bits": bits, "text": text, "mixed": names[0], "plain": names[1]}
                sizes = {"mixed_bytes": mixed["bytes"]["total"], "plain_bytes": plain["bytes"]["total"]}
                ratio = score.value / base.value
                rows.append({**row, **sizes, "ratio": ratio, **difference(score, base)})
    return rows


def float_agreement(ours: Mapping[str, Any], peers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The float model scored by two programs: how far apart the instruments are."""
    if "float" not in ours or "float" not in peers:
        return []
    return [
        {"text": text, "our_ppl": own.value, "peer_ppl": other.value, **difference(own, other)}
        for text, own in our_scores(ours["float"]).items()
        for other in peer_scores(peers["float"])
        if own.token_sha256 == other.token_sha256
    ]


def compare(results: Path) -> dict[str, Any]:
    """The content of ``comparison.json``, without the header.

    Args:
        results: the folder with ``yardstick`` and ``peers``.
    """
    from bitfloor.evaluation.paired import MARGIN

    ours, peers = load_ours(results / "yardstick"), load_peers(results / "peers")
    rows = against_peers(ours, peers)
    used = [path for part in ("yardstick", "peers") for path in sorted((results / part).glob("*.json"))]
    return {
        "inputs": {path.relative_to(results).as_posix(): record.file_sha256(path) for path in used},
        "margin": MARGIN,
        "group_size": GROUP,
        "float": float_agreement(ours, peers),
        "peers": rows,
        "summary": summary(rows),
        "range_search": search_gain(ours),
        "mixed": mixed_gain(ours),
    }


def main() -> None:
    """Compare and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    args = parser.parse_args()
    found = compare(args.results)
    head = record.header(("evaluation/paired.py",))
    record.write_result(args.results / "comparison.json", {**head, **found})
    out = sys.stdout.write
    for row in found["float"]:
        out(f"float {row['text']}: {row['our_ppl']:.4f} here, {row['peer_ppl']:.4f} there\n")
    for row in found["summary"]:
        verdict = "not worse" if row["not_worse_than_strongest"] else "NOT SHOWN to be not worse"
        out(f"{row['ours']} {row['text']}: {verdict} than {row['strongest']} (the strongest of {row['settings']}); ")
        out(f"not worse than {row['not_worse_than']} of {row['settings']}\n")
    for row in found["range_search"]:
        out(f"W{row['bits']} {row['text']}: searched ranges are {row['percent_below']:.1f}% below min-max\n")


if __name__ == "__main__":
    main()

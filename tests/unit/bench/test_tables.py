"""Tables, comparison and figure, from results made up here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import compare
import figure
import pytest
import record
import tables

WINDOWS = 4
SPREAD = (-0.02, 0.01, 0.03, -0.02)


def losses(mean: float, scale: float = 1.0) -> list[float]:
    return [mean + scale * d for d in SPREAD]


def entry(mean: float, text: str, scale: float = 1.0) -> dict[str, Any]:
    return {
        "ppl": math.exp(mean),
        "windows": WINDOWS,
        "seqlen": 9,
        "ids_sha256": f"tokens of {text}",
        "nll_per_window": losses(mean, scale),
    }


def ours(name: str, mean: float, bits: float = 16.0, embedding: int = 16, scale: float = 1.0) -> dict[str, Any]:
    content = {
        "name": name,
        "bits_per_linear_weight": bits,
        "bits_per_parameter": bits + 1,
        "bytes": {"total": int(bits * 1e6)},
        "calibration": {"ids_sha256": "calibration"},
        "perplexity": {text: entry(mean, text, scale) for text in ("wiki", "c4")},
    }
    if name == "float":
        return content
    return {**content, "embedding_bits": embedding, "quantization": {"cpu_seconds": 12.3}}


def peer(bits: int, mean: float, scale: float = 1.0, tool: str = "gptqmodel", **settings: Any) -> dict[str, Any]:
    return {
        "tool": tool,
        "versions": {tool: "7.7.0"},
        "bits": bits,
        "group_size": 64,
        "settings": settings,
        "calibration": {"ids_sha256": "calibration"},
        "evaluation": {
            f"{text}_as_they_say": {
                "ppl": math.exp(mean),
                "windows": WINDOWS,
                "window_tokens": 9,
                "ids_sha256": f"tokens of {text}",
                "window_mean_nll": losses(mean, scale),
            }
            for text in ("wiki", "c4")
        },
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    made = {
        "yardstick/float": ours("float", 3.0),
        "yardstick/gptq-w2g64": ours("gptq-w2g64", 3.5, 2.28),
        "yardstick/gptq-w3g64": ours("gptq-w3g64", 3.1, 3.3),
        "yardstick/gptq-w3g64+embedding8": ours("gptq-w3g64+embedding8", 3.11, 3.3, embedding=8),
        "yardstick/rtn-w3g64": ours("rtn-w3g64", 3.2, 3.3),
        "yardstick/rtn-minmax-w3g64": ours("rtn-minmax-w3g64", 3.7, 3.3),
        "peers/float": {"tool": "none", "evaluation": peer(0, 3.0)["evaluation"]},
        "peers/w3-plain": peer(3, 3.15, sym=True),
        "peers/w3-best": peer(3, 3.095, sym=False, mse=2.4, desc_act=True),
        "peers/w2-wild": peer(2, 3.5, scale=30.0, sym=False),
        "peers/unfinished": {"tool": "gptqmodel", "bits": 3, "group_size": 64},
    }
    for name, content in made.items():
        record.write_result(folder / f"{name}.json", content)
    record.write_result(folder / "comparison.json", compare.compare(folder))
    return folder


def test_comparison_pairs_windows_and_judges(results: Path) -> None:
    found = record.read_result(results / "comparison.json")
    rows = {(row["peer"], row["text"]): row for row in found["peers"]}
    assert set(rows) == {(name, text) for name in ("w3-plain", "w3-best", "w2-wild") for text in ("wiki", "c4")}
    better, close, wild = (rows[name, "wiki"] for name in ("w3-plain", "w3-best", "w2-wild"))
    # Equal spreads cancel in the pairs, so these intervals are as narrow as float rounding.
    assert better["delta_nll"] == pytest.approx(-0.05) and better["not_worse"] and not better["strongest"]
    assert close["ci95"] == pytest.approx([0.005, 0.005]) and close["not_worse"] and close["strongest"]
    # The mean difference is zero and the spread large: nothing is shown.
    assert wild["delta_nll"] == pytest.approx(0.0, abs=1e-12) and not wild["not_worse"]
    assert close["peer_tool"] == "gptqmodel 7.7.0" and close["same_calibration_tokens"]
    summary = {(row["bits"], row["text"]): row for row in found["summary"]}
    assert summary[3, "c4"]["strongest"] == "w3-best" and summary[3, "c4"]["not_worse_than"] == 2
    assert not summary[2, "c4"]["not_worse_than_strongest"]
    assert [row["delta_nll"] for row in found["float"]] == [0.0, 0.0]


def test_a_result_is_compared_with_the_software_that_makes_the_same_kind_of_thing(results: Path) -> None:
    name = "signround-w2g64+calibration.batch_size-4"
    record.write_result(results / "yardstick" / f"{name}.json", ours(name, 3.4, 2.25))
    record.write_result(results / "yardstick" / "bitfloor-w2g64.json", ours("bitfloor-w2g64", 3.3, 2.28))
    rival = {**peer(2, 3.45, tool="auto-round", iters=200, enable_alg_ext=True), "bits_per_linear_weight": 2.25}
    record.write_result(results / "peers" / "other.json", rival)
    plain = peer(2, 3.5, tool="auto-round", iters=200)
    record.write_result(results / "peers" / "another.json", plain)
    rows = compare.compare(results)["peers"]
    pairs = {(row["ours"], row["peer"]) for row in rows if row["bits"] == 2}
    # SignRound meets SignRound; what is ours meets everything.
    own = {(name, "another"), ("bitfloor-w2g64", "other"), ("bitfloor-w2g64", "another")}
    assert pairs == {*own, ("gptq-w2g64", "w2-wild")}
    extended = next(row for row in rows if row["peer"] == "other")
    assert tables.settings_cell(extended["peer_settings"]) == "asym, alg_ext, iters=200"
    rates = {"sym": True, "iters": 200}
    assert [tables.settings_cell({**rates, "lr": lr}) for lr in (0.005, 0.002)] == [
        "sym, iters=200",
        "sym, iters=200, lr=0.002",
    ]
    assert tables.cost_cell({"our_cpu_seconds": 12.3, "peer_cpu_seconds": 24.6}) == "12 / 25 = 0.50"
    assert tables.cost_cell({"our_cpu_seconds": 12.3, "peer_cpu_seconds": None}) == "12 / -"
    record.write_result(results / "comparison.json", compare.compare(results))
    drawn = {line.name: line.points for line in figure.series(tables.load_results(results), "c4")[0]}
    assert drawn[f"auto-round{figure.PEER}"] == ((2.25, pytest.approx(math.exp(3.45))),)
    assert drawn["signround"] == ((2.25, pytest.approx(math.exp(3.4))),)


def test_search_gain_is_a_percentage_of_the_plain_perplexity(results: Path) -> None:
    gain = record.read_result(results / "comparison.json")["range_search"]
    assert [row["percent_below"] for row in gain] == pytest.approx([100 * (1 - math.exp(-0.5))] * 2)


def test_peers_of_other_tokens_are_left_out(results: Path) -> None:
    path = results / "peers" / "w3-best.json"
    content = record.read_result(path)
    content["evaluation"]["c4_as_they_say"]["ids_sha256"] = "other tokens"
    record.write_result(path, content)
    rows = compare.compare(results)["peers"]
    assert [row["text"] for row in rows if row["peer"] == "w3-best"] == ["wiki"]


def test_variants_stand_side_by_side() -> None:
    def content(block: int, bits: int, *names: str) -> dict[str, Any]:
        rows = [{"name": name, "cpu_seconds": 1.26, "kl_c4": 0.5, "kl_wiki": bits / 10} for name in names]
        return {"block": block, "bits": bits, "variants": rows}

    found = {
        "ablation/block12-w3": content(12, 3, "start"),
        "ablation/block12-w2": content(12, 2, "start", "steps"),
        "ablation/wider-block12-w2": content(12, 2, "pair"),
    }
    lines = tables.ablation(found).splitlines()
    assert lines[0].startswith("|  | block 12, W2: CPU-seconds | KL, C4 | KL, WikiText-2 | block 12, W3")
    assert lines[2:] == [
        "| start | 1.3 | 0.5000 | 0.2000 | 1.3 | 0.5000 | 0.3000 |",
        "| steps | 1.3 | 0.5000 | 0.2000 | - | - | - |",
    ]
    assert tables.wider(found).splitlines()[2:] == ["| pair | 1.3 | 0.5000 | 0.2000 |"]
    with pytest.raises(SystemExit, match="ablation is empty"):
        tables.ablation({})


def test_a_lost_window_is_refused(results: Path) -> None:
    path = results / "yardstick" / "gptq-w3g64.json"
    content = record.read_result(path)
    content["perplexity"]["wiki"]["nll_per_window"].pop()
    record.write_result(path, content)
    with pytest.raises(SystemExit, match="3 losses for 4 windows"):
        compare.compare(results)


def test_main_table(results: Path) -> None:
    lines = tables.yardstick(tables.load_results(results)).splitlines()
    assert lines[0].startswith(
        "| method | bits per linear weight | bits per parameter | size | WikiText-2 perplexity |"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| float",
        "| gptq-w3g64",
        "| rtn-minmax-w3g64",
        "| rtn-w3g64",
        "| gptq-w2g64",
    ]
    assert lines[3] == (
        "| gptq-w3g64 | 3.30 | 4.30 | 3.3 MB | 22.20 | +0.100 [+0.100, +0.100] | 22.20 | +0.100 [+0.100, +0.100] | 12 |"
    )
    assert lines[2].endswith("| 20.09 | - | 20.09 | - | - |")
    assert len({line.count("|") for line in lines}) == 1
    assert "embedding8" in tables.shipped(tables.load_results(results))


def test_peer_table(results: Path) -> None:
    lines = tables.peers(tables.load_results(results)).splitlines()
    assert (
        "| gptq-w3g64, WikiText-2 | 22.20 | gptqmodel 7.7.0 (strongest) | asym, desc_act, mse=2.4 | 22.09 "
        "| +0.005 [+0.005, +0.005] | yes | 12 / - |"
    ) in lines
    assert sum("| not shown |" in line for line in lines) == 2


@pytest.mark.parametrize("value", [0.5, 20.852, 999.99])
def test_perplexities_have_two_digits(value: float) -> None:
    assert tables.perplexity_cell(value) == f"{value:.2f}"


def test_large_perplexities_are_whole() -> None:
    assert tables.perplexity_cell(123456.7) == "123,457"


def test_one_window_has_no_interval() -> None:
    assert tables.difference_cell({"delta_nll": -0.25, "ci95": None}) == "-0.250"


def test_render_replaces_only_what_is_marked(results: Path) -> None:
    text = "# Title\n\n<!-- table:ranges -->\nold | stuff\n<!-- /table:ranges -->\n\nEnd | here.\n"
    made = tables.render(text, tables.load_results(results))
    assert made.startswith("# Title\n\n<!-- table:ranges -->\n|  | min-max |")
    assert made.endswith("|\n<!-- /table:ranges -->\n\nEnd | here.\n") and "old" not in made
    assert tables.render(made, tables.load_results(results)) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no table", "no table marker"),
        ("<!-- table:nothing -->\n<!-- /table:nothing -->\n", "'nothing' is no table"),
        ("<!-- table:ranges -->\n", "do not match"),
        ("<!-- table:memory -->\n<!-- /table:memory -->\n", "memory.json is missing"),
    ],
)
def test_render_refuses(results: Path, text: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        tables.render(text, tables.load_results(results))


def run_tables(monkeypatch: pytest.MonkeyPatch, readme: Path, results: Path, *options: str) -> Any:
    argv = ["tables.py", "--file", str(readme), "--results", str(results), *options]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        tables.main()
    return stopped.value.code


def test_check_fails_on_an_old_document_and_on_stale_results(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:ranges -->\n<!-- /table:ranges -->\n")
    assert run_tables(monkeypatch, readme, results, "--check") == 1
    assert "README.md is not what the results give" in capsys.readouterr().err
    assert readme.read_text() == "<!-- table:ranges -->\n<!-- /table:ranges -->\n"
    assert run_tables(monkeypatch, readme, results) == 0
    assert run_tables(monkeypatch, readme, results, "--check") == 0

    path = results / "yardstick" / "rtn-w3g64.json"
    fresh = record.read_result(path)
    record.write_result(path, {**fresh, "code": {"parts": ["core"], "sha256": "0" * 64}})
    record.write_result(results / "comparison.json", compare.compare(results))
    assert run_tables(monkeypatch, readme, results, "--check") == 1
    assert "yardstick/rtn-w3g64.json is stale: the code has changed" in capsys.readouterr().err


def test_a_comparison_is_stale_when_a_result_changes_or_comes(results: Path) -> None:
    assert tables.stale_results(results) == []
    record.write_result(results / "peers" / "w3-new.json", peer(3, 3.0))
    assert ["w3-new.json came after it" in sentence for sentence in tables.stale_results(results)] == [True]
    record.write_result(results / "comparison.json", compare.compare(results))
    assert tables.stale_results(results) == []
    record.write_result(results / "peers" / "w3-new.json", peer(3, 3.01))
    assert ["peers/w3-new.json" in sentence for sentence in tables.stale_results(results)] == [True]


def test_memory_and_determinism_tables() -> None:
    models = [
        {"layers": n, "checkpoint_bytes": n * 45_000_000, "peak_rss_bytes": 10**9, "planned_bytes": 1_100_000_000}
        for n in (24, 48)
    ]
    text = tables.memory({"memory": {"models": models}})
    assert "| 48 layers | 2.16 GB | 1.00 GB | 1.10 GB | +10.0% |\n" in text
    trials = {
        "kills": 50,
        "sequences": 9,
        "sequences_with_other_bytes": 0,
        "landed": {"by_stage": {"merging": 10, "blocks": 40}, "inside_a_write": 12},
    }
    content = {"runs": {"1": {"same": True}, "2": {"same": False}}, "kill_trials": trials}
    text = tables.determinism({"determinism": content})
    assert "| 50 kills in 9 runs (40 blocks, 10 merging; 12 inside a write) | same bytes |" in text
    assert "| two runs, 2 thread(s) | **different** |" in text


def test_a_long_legend_is_broken_into_rows_that_fit() -> None:
    names = [f"a method with a long name {i}" for i in range(9)]
    rows = figure.legend_rows(names)
    assert [name for row in rows for _, name in row] == names and len(rows) > 1
    assert all(x + 10 + 7 * len(name) <= 2 * figure.WIDTH for row in rows for x, name in row)


def test_figure_is_well_formed_and_holds_every_point(results: Path) -> None:
    made = figure.draw(tables.load_results(results))
    assert made == figure.draw(tables.load_results(results))
    root = ElementTree.fromstring(made)
    svg = "{http://www.w3.org/2000/svg}"
    titles = [node.text or "" for node in root.iter(f"{svg}title")]
    assert titles.count("gptq: 2.28 bits, perplexity 33.12") == 2
    assert titles.count(f"gptqmodel{figure.PEER}: 3.30 bits, perplexity 22.09") == 2
    assert not any("embedding" in title for title in titles)
    inside = [
        (float(c.attrib["cx"]), float(c.attrib["cy"])) for g in root.iter(f"{svg}g") for c in g.iter(f"{svg}circle")
    ]
    assert inside and all(
        figure.LEFT <= x <= figure.WIDTH - figure.RIGHT and figure.TOP <= y <= figure.HEIGHT - figure.BOTTOM
        for x, y in inside
    )


def test_figure_without_results_is_refused() -> None:
    with pytest.raises(SystemExit, match="no results"):
        figure.draw({})


def test_axis_ticks_are_few_and_inside() -> None:
    for low, high in ((20.0, 30.0), (20.0, 200.0), (20.0, 1e6)):
        found = figure.ticks(low, high)
        assert 2 <= len(found) <= 8 and all(low <= value <= high for value in found)


def test_results_are_json_with_a_final_newline(results: Path) -> None:
    for path in results.rglob("*.json"):
        assert path.read_text().endswith("}\n")
        json.loads(path.read_text())

"""Parts of the measuring programs that need no model."""

from __future__ import annotations

from pathlib import Path

import attempts
import determinism
import memory
import record
import rounding
import synthetic
import torch
import yardstick
from safetensors import safe_open


def test_result_names_say_what_was_changed() -> None:
    base = ["--model", "m", "--work", "w"]
    assert yardstick.result_name("gptq-w2g64", yardstick.arguments(base)) == "gptq-w2g64"
    args = yardstick.arguments([*base, "--embedding-bits", "8", "--set", "method.damping=0.05"])
    assert yardstick.result_name("gptq-w2g64", args) == "gptq-w2g64+embedding8+method.damping-0.05"
    assert "embedding.bits=8" in yardstick.overrides_of(args)


def test_plain_hash_is_of_little_endian_words() -> None:
    # sha256 of the 16 bytes 01 00 .. 02 00 ...
    ids = torch.tensor([[1, 2]])
    assert yardstick.plain_ids_sha256(ids) == yardstick.plain_ids_sha256(ids.T)
    assert yardstick.plain_ids_sha256(ids).startswith("0c730b69905c5ef7")


def test_memory_checks() -> None:
    few = {"peak_rss_bytes": 1000, "planned_bytes": 1100, "checkpoint_bytes": 900}
    many = {"peak_rss_bytes": 1040, "planned_bytes": 1100, "checkpoint_bytes": 2_100_000_000}
    assert all(check["holds"] for check in memory.check(few, many).values())
    assert not memory.check(few, {**many, "peak_rss_bytes": 1060})["depth"]["holds"]
    assert not memory.check(few, {**many, "peak_rss_bytes": 900})["plan"]["holds"]
    assert not memory.check(few, {**many, "checkpoint_bytes": 1039})["checkpoint"]["holds"]


def test_synthetic_checkpoint_repeats_and_counts_its_bytes(tmp_path: Path) -> None:
    shape = synthetic.Shape(layers=2, hidden=32, intermediate=48, head_dim=16)
    total = synthetic.build(tmp_path / "a", shape)
    assert total == synthetic.build(tmp_path / "b", shape)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [(tmp_path / "b" / n).read_bytes() for n in names]
    counted = 0
    for path in (tmp_path / "a").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            counted += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert counted == total == 2 * (257 * 32 + 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32))


def test_synthetic_text_is_long_enough(tmp_path: Path) -> None:
    lines = synthetic.write_text(tmp_path, 3, 100).read_text().splitlines()
    assert len(lines) == 3 and all(len(line) >= 99 for line in lines)


def test_the_two_of_a_comparison_take_turns() -> None:
    called: list[str] = []
    times = rounding.take_turns([lambda: called.append("a"), lambda: called.append("b")], 0.0)
    assert called == ["a", "b"] * rounding.FEWEST and [len(each) for each in times] == [rounding.FEWEST] * 2
    one = torch.zeros(2), torch.ones(2)
    assert rounding.same(one, one) and not rounding.same(one, one[::-1]) and rounding.same(one[0], one[0])
    assert (record.RESULTS / rounding.SOURCE).is_file()


def test_what_a_kill_hit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert attempts.classify(out, 2) is None
    out.mkdir()
    assert attempts.classify(out, 2) == {"stage": "before the journal", "parts_finished": 0, "inside_write_of": []}
    journal = out / attempts.JOURNAL
    journal.mkdir()
    (journal / "ends.safetensors").write_bytes(b"")
    (journal / "block-00000.safetensors.tmp").write_bytes(b"")
    assert attempts.classify(out, 2) == {
        "stage": "blocks",
        "parts_finished": 1,
        "inside_write_of": ["block-00000.safetensors.tmp"],
    }
    (journal / "block-00000.safetensors.tmp").rename(journal / "block-00000.safetensors")
    assert (attempts.classify(out, 2) or {})["stage"] == "merging"
    (out / "config.json").write_text("{}")
    assert (attempts.classify(out, 2) or {})["stage"] == "removing the journal"
    assert list(determinism.hashes(out)) == ["config.json"]

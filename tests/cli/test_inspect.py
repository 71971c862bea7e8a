"""``bitfloor inspect``: bytes from headers, the documented JSON, and a sentence for folders that are not ours."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import pytest
from cli.conftest import Folder, Run

from bitfloor.cli.bits import CELL, COLOURS, GAP, channel_widths, widths_of
from bitfloor.cli.inspection import Layer
from bitfloor.pipeline.timing import remember

SCHEMA = {"recipe", "bits_per_linear_weight", "bits_per_parameter", "bytes", "tuning", "restoration", "layers"}
SCHEMA |= {"format_version", "verified"}
LAYER = {"name", "shape", "segments", "rotation", "sorted", "bytes", "bits_per_weight", "block_error", "learning"}


def test_the_json_is_exactly_the_documented_one(run: Run, folder: Folder) -> None:
    outcome = run("inspect", folder.path, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert set(found) == SCHEMA and all(set(layer) == LAYER for layer in found["layers"])
    assert found["bytes"] == {"total": 5042, "linears": 2770, "embeddings": 2144, "other": 128}
    # Linears: two quantized of 1024 weights, one kept of 1024. The model: those, an embedding of 2048, a norm of 64.
    assert found["bits_per_linear_weight"] == pytest.approx(8 * 2770 / 3072)
    assert found["bits_per_parameter"] == pytest.approx(8 * 5042 / (3072 + 2048 + 64))
    assert found["recipe"] == {"name": "mine", "sha256": "0" * 64, **folder.report["recipe"]}
    assert found["format_version"] == 1 and found["verified"] is None
    embedding, second, tenth = found["layers"]
    assert [embedding["name"], second["name"], tenth["name"]] == [
        "model.embed",
        "model.layers.2.up",
        "model.layers.10.up",
    ]
    assert embedding["bytes"] == 2144 and embedding["block_error"] is None
    assert second == {
        "name": "model.layers.2.up",
        "shape": [16, 64],
        "segments": [{"bits": 4, "columns": 32, "group_size": 32}, {"bits": 1, "columns": 32, "group_size": 32}],
        "rotation": 0,
        "sorted": False,
        "bytes": 394,
        "bits_per_weight": 8 * 394 / 1024,
        "block_error": 0.25,
        "learning": None,
    }


def test_the_table_says_the_same(run: Run, folder: Folder) -> None:
    remember(folder.report["made_from"], {"model.layers.2.up": 1.5})
    outcome = run("inspect", folder.path)
    assert outcome.code == 0
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.strip()}
    assert rows["model.layers.2.up"][1:] == ["16", "x", "64", "4+1", "32", "394", "B", "3.078", "0.25", "1.5", "s"]
    assert rows["model.layers.10.up"][-2:] == ["-", "-"]
    assert rows["recipe"] == ["recipe", "mine"]
    assert "5.04 kB, 2.06x smaller than at 16 bits" in outcome.out  # 2 * 5184 / 5042
    assert "\x1b" not in outcome.out and all(line == line.rstrip() for line in outcome.out.splitlines())


def test_without_a_report_the_bytes_still_stand(run: Run, folder: Folder) -> None:
    (folder.path / "bitfloor.json").unlink()
    found = json.loads(run("inspect", folder.path, "--json").out)
    assert found["bytes"]["total"] == 5042 and found["recipe"] == {"name": "mine", "sha256": "0" * 64}
    assert all(layer["block_error"] is None for layer in found["layers"])


def test_a_report_of_another_checkpoint_is_refused(run: Run, folder: Folder) -> None:
    folder.write_report(bytes={"total": 5041, "linears": 2769, "embeddings": 2144, "other": 128})
    outcome = run("inspect", folder.path)
    assert outcome.code == 2 and "5041" in outcome.err and "5042" in outcome.err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", "mine"),
        ("bytes", 5042),
        ("files", ["model.safetensors"]),
        ("files", {"model.safetensors": 1}),
        ("made_from", []),
        ("matrices", []),
        ("matrices", {"model.layers.2.up": 3}),
        ("matrices", {"model.layers.2.up": {"block_error": "small"}}),
        ("matrices", {"model.layers.2.up": {"learning": {"before": 1.0}}}),
        ("kept", 1),
        ("tuning", {"before": 1.0, "after": None, "step": 3}),
        ("restoration", "done"),
    ],
)
def test_a_report_of_other_types_is_refused(run: Run, folder: Folder, key: str, value: object) -> None:
    folder.write_report(**{key: value})
    for options in ((), ("--json", "--verify"), ("--bits",)):
        outcome = run("inspect", folder.path, *options)
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and outcome.out == ""
        assert f"bitfloor.json: {key} must be " in outcome.err


def test_a_report_that_is_no_object_is_refused(run: Run, folder: Folder) -> None:
    (folder.path / "bitfloor.json").write_text("[]")
    outcome = run("inspect", folder.path)
    assert outcome.code == 2 and "is no JSON object" in outcome.err


def test_verify_says_what_it_compared(run: Run, folder: Folder) -> None:
    """The fixture's shard has no checksum; one of the report's is as good."""
    shard = folder.path / "model.safetensors"
    outcome = run("inspect", folder.path, "--verify")
    assert outcome.code == 0 and "0 as written, 1 without a checksum (model.safetensors)" in outcome.out
    folder.write_report(files={shard.name: hashlib.sha256(shard.read_bytes()).hexdigest()})
    found = json.loads(run("inspect", folder.path, "--verify", "--json").out)
    assert found["verified"] == {"files": ["model.safetensors"], "without_checksum": []}
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run("inspect", folder.path).code == 0
    outcome = run("inspect", folder.path, "--verify")
    assert outcome.code == 2 and "model.safetensors is damaged" in outcome.err and outcome.out == ""


@pytest.mark.filterwarnings("default::bitfloor.core.errors.FormatWarning")
def test_an_older_version_is_read_and_said_once(run: Run, folder: Folder) -> None:
    config = json.loads((folder.path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 0
    (folder.path / "config.json").write_text(json.dumps(config))
    outcome = run("inspect", folder.path, "--json")
    assert json.loads(outcome.out)["format_version"] == 0
    assert outcome.err.count("note: the checkpoint is of format version 0") == outcome.err.count("\n") == 1
    assert "bitfloor migrate" in outcome.err


def test_a_truncated_shard_is_refused(run: Run, folder: Folder) -> None:
    shard = folder.path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    outcome = run("inspect", folder.path)
    assert outcome.code == 2 and "model.safetensors" in outcome.err and outcome.out == ""


def test_a_damaged_report_is_refused(run: Run, folder: Folder) -> None:
    (folder.path / "bitfloor.json").write_text("{")
    outcome = run("inspect", folder.path)
    assert outcome.code == 2 and "bitfloor.json" in outcome.err


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "float model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"hello": 1}, "not a bitfloor checkpoint"),
    ],
)
def test_other_models_are_named(run: Run, tmp_path: Path, config: dict[str, object], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = run("inspect", tmp_path)
    assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1


def test_an_unfinished_run_is_told_from_an_empty_folder(run: Run, tmp_path: Path) -> None:
    empty = run("inspect", tmp_path)
    (tmp_path / ".bitfloor").mkdir()
    unfinished = run("inspect", tmp_path)
    missing = run("inspect", tmp_path / "nothing")
    assert [outcome.code for outcome in (empty, unfinished, missing)] == [2, 2, 2]
    assert "unfinished run" in unfinished.err and "unfinished run" not in empty.err
    assert "does not exist" in missing.err


def test_bits_are_counted_by_kind_and_by_depth(run: Run, folder: Folder, tmp_path: Path) -> None:
    outcome = run("inspect", folder.path, "--bits", "--image", tmp_path / "bits.png")
    assert outcome.code == 0, outcome.err
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.strip()}
    # Two matrices of two groups: four bits and one, and twice two.
    assert rows["up"] == ["2.250", "25.0%", "50.0%", "25.0%"]
    assert [line.split()[1] for line in outcome.out.splitlines() if line.strip().startswith("block")] == ["2", "10"]
    assert "wrote" in outcome.err and "1 bit #fde725" in outcome.err
    data = (tmp_path / "bits.png").read_bytes()
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert (width, height) == (2 * CELL + GAP, 2 * CELL)
    lines = zlib.decompress(data[data.index(b"IDAT") + 4 : -16])
    assert len(lines) == height * (1 + 3 * width)
    assert lines[1:4] == bytes(COLOURS[4]) and lines[1 + 3 * CELL : 4 + 3 * CELL] == bytes(COLOURS[1])


def test_widths_of_whole_channels_count_by_columns() -> None:
    def layer(*segments: tuple[int, int, int]) -> Layer:
        parts = [dict(zip(("bits", "columns", "group_size"), part, strict=True)) for part in segments]
        return Layer("a", "linear", (16, sum(part[1] for part in segments)), tuple(parts), 0, None, None, None)

    assert widths_of(layer((4, 16, 16), (1, 64, 64)), None) == (4, 1, 1, 1, 1)
    assert widths_of(layer((4, 9, 9), (1, 39, 39)), None) == (4,) * 3 + (1,) * 13
    # Groups of one size, the last one short.
    assert widths_of(layer((1, 24, 16), (2, 16, 16)), None) == (1, 1, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image", "a.png"], "add --bits"),
        (["--bits", "--json"], "use one of them"),
        (["--bits", "--image", "a.jpg"], "does not end in .png"),
    ],
)
def test_bits_of_nothing(run: Run, folder: Folder, options: list[str], says: str) -> None:
    outcome = run("inspect", folder.path, *options)
    assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1


def test_whole_channels_are_drawn_where_they_enter(tmp_path: Path) -> None:
    """The golden matrices with an order of single channels: four bits for those that it names first."""
    golden = Path(__file__).parents[1] / "golden" / "v0"
    found = channel_widths(golden)
    assert set(found) == {"salient"}  # others have groups, leave channels out or name some twice
    order = [(7 * p + 3) % 45 for p in range(45)]
    assert found["salient"] == tuple(4 if order.index(channel) < 9 else 1 for channel in range(45))


def test_migrate_writes_version_1_beside_or_in_place(run: Run, folder: Folder, tmp_path: Path) -> None:
    for options in ((), (tmp_path / "out", "--in-place")):
        outcome = run("migrate", folder.path, *options)
        assert outcome.code == 2 and "--in-place" in outcome.err and outcome.err.count("\n") == 1
    outcome = run("migrate", folder.path, "--in-place")
    assert outcome.code == 2 and "of format version 1 already" in outcome.err
    config = json.loads((folder.path / "config.json").read_text())
    config["quantization_config"]["format_version"] = 0
    (folder.path / "config.json").write_text(json.dumps(config))
    for path, options in ((tmp_path / "out", (tmp_path / "out",)), (folder.path, ("--in-place",))):
        outcome = run("migrate", folder.path, *options)
        assert (outcome.code, outcome.out) == (0, "") and "format version 0 is now 1" in outcome.err
        found = json.loads(run("inspect", path, "--verify", "--json").out)
        assert found["format_version"] == 1 and found["verified"]["files"] == ["model.safetensors"]

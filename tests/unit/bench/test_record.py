"""What makes a result stale, and what must not be in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cost
import pytest
import record
import torch
import unchanged
from safetensors.torch import save_file

SOURCE = '''"""Rounds."""

LIMIT = 0.25
"""Of the damping."""


def f(x: float) -> float:
    """Twice."""
    # slowly
    if x < 0:
        raise ValueError(f"{x} is negative")
    return 2 * x
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "core").mkdir(parents=True)
    (folder / "core" / "a.py").write_text(SOURCE)
    (folder / "one.py").write_text("A = 1\n")
    return folder


def hash_of(package: Path, source: str) -> str:
    (package / "core" / "a.py").write_text(source)
    return record.code_sha256(("core", "one.py"), package)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Rounds."""', '"""Rounds to nearest."""'),
        ('"""Twice."""', '"""Two times.\n\n    Returns: it.\n    """'),
        ('    """Twice."""\n', ""),
        ('"""Of the damping."""\n', ""),
        ("# slowly", "# fast, and\n    # safely"),
        ("return 2 * x", "return (2\n            * x)"),
        ("is negative", "is below zero; use more"),
    ],
)
def test_rewording_keeps_the_hash(package: Path, old: str, new: str) -> None:
    before = hash_of(package, SOURCE)
    assert old in SOURCE
    assert hash_of(package, SOURCE.replace(old, new)) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 0.25", "LIMIT = 0.26"),
        ("LIMIT = 0.25", "LIMIT = None"),
        ("2 * x", "2.0 * x"),
        ("2 * x", "2 + x"),
        ("2 * x", "True * x"),
        ("x < 0", "x <= 0"),
        ("def f(x: float)", "def f(x: float = 1.0)"),
        ("return 2 * x", 'return "2 * x"'),
    ],
)
def test_a_changed_program_changes_the_hash(package: Path, old: str, new: str) -> None:
    before = hash_of(package, SOURCE)
    assert old in SOURCE
    assert hash_of(package, SOURCE.replace(old, new)) != before


def test_the_hash_covers_names_of_files_and_every_part(package: Path) -> None:
    before = hash_of(package, SOURCE)
    (package / "one.py").write_text("A = 2\n")
    changed = hash_of(package, SOURCE)
    assert changed != before
    (package / "core" / "a.py").rename(package / "core" / "b.py")
    assert record.code_sha256(("core", "one.py"), package) != changed
    with pytest.raises(SystemExit, match="solvers is not part of the package"):
        record.code_sha256(("solvers",), package)


def test_the_parts_of_this_package_exist() -> None:
    gptq, rtn = record.quality("gptq"), record.quality("rtn")
    assert {"methods/gptq.py", "solvers/gptq.py", "solvers/ranges.py", "methods/base.py", "core"} <= set(gptq)
    assert {"methods/rtn.py", "solvers/ranges.py"} <= set(rtn)
    assert not {"solvers/gptq.py", "methods/gptq.py", "methods/table.py", "methods/options.py"} & set(rtn)
    hashes = {record.code_sha256(parts) for parts in (gptq, rtn, (*gptq, *record.RUNNING))}
    assert len(hashes) == 3


def test_imports_are_followed_by_any_spelling(tmp_path: Path) -> None:
    package = tmp_path / "bitfloor"
    for name in ("a", "b", "c", "d", "e"):
        (package / "solvers").mkdir(parents=True, exist_ok=True)
        (package / "solvers" / f"{name}.py").write_text("")
    path = package / "solvers" / "x.py"
    path.write_text(
        "import os, bitfloor.solvers.a\n"
        "from bitfloor.solvers.b import thing\n"
        "from bitfloor.solvers import c, unknown\n"
        "def f():\n    from bitfloor.solvers.d import late\n"
    )
    assert record.imported(path, package) == [f"solvers/{name}.py" for name in "abcd"]


def test_stale_by_code(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    code = {"parts": ["core"], "sha256": record.code_sha256(("core",), package)}
    path.write_text(json.dumps({"code": code}))
    assert record.stale(path, package) is None
    (package / "core" / "a.py").write_text(SOURCE.replace("0.25", "0.5"))
    assert "the code has changed" in str(record.stale(path, package))
    (package / "core" / "a.py").unlink()
    (package / "core").rmdir()
    assert "the code has changed" in str(record.stale(path, package))


def test_code_that_was_shown_to_give_the_same_bytes_is_the_same_code(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "results" / "yardstick" / "x.json"
    path.parent.mkdir(parents=True)
    versions = [SOURCE.replace("0.25", str(limit)) for limit in (0.25, 0.5, 0.75)]
    first, second, third = (hash_of(package, source) for source in versions)
    parts = ["core", "one.py"]
    path.write_text(json.dumps({"code": {"parts": parts, "sha256": first}}))

    def shown(*pairs: tuple[str, str, str]) -> str | None:
        told = [{"result": name, "parts": parts, "was": was, "is": now} for name, was, now in pairs]
        (tmp_path / "results" / "unchanged.json").write_text(json.dumps({"pairs": told}))
        return record.stale(path, package)

    assert shown(("x", first, second), ("x", second, third)) is None
    assert shown(("x", first, third)) is None
    assert "the code has changed" in str(shown(("x", first, second)))
    assert "the code has changed" in str(shown(("y", first, third)))
    assert "the code has changed" in str(shown(("x", first, second), ("x", second, first)))


def test_stale_by_recipe(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"preset": "gptq-w2g64", "overrides": ["embedding.bits=16"], "calibration": "a.txt"}
    recipe["sha256"] = record.recipe_sha256(**recipe)
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"recipe": recipe}))
    assert record.stale(path) is None
    path.write_text(json.dumps({"recipe": {**recipe, "overrides": ["embedding.bits=8"]}}))
    assert "gptq-w2g64 has changed" in str(record.stale(path))


def test_stale_by_inputs(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    path = tmp_path / "result.json"
    record.write_result(path, {"inputs": {"a.json": record.file_sha256(tmp_path / "a.json")}})
    assert record.stale(path) is None
    (tmp_path / "a.json").write_text("{ }")
    assert "a.json" in str(record.stale(path))
    (tmp_path / "a.json").unlink()
    assert "a.json" in str(record.stale(path))


def test_a_result_of_other_software_is_never_stale(tmp_path: Path) -> None:
    path = tmp_path / "peer.json"
    record.write_result(path, {"tool": "another"})
    assert record.stale(path) is None


def test_commands_lose_their_paths() -> None:
    given = ["/home/somebody/bench/a.py", "--model", "/data/models/hf", "calibration.text=/data/c4.txt", "bits=2"]
    assert record.command(given) == ["a.py", "--model", "hf", "calibration.text=c4.txt", "bits=2"]


def test_the_header_has_no_path_and_no_host() -> None:
    head = record.header(record.quality("rtn"))
    assert set(head) == {"command", "versions", "commit", "dirty", "machine", "code", "date"}
    text = json.dumps(head)
    assert str(record.ROOT) not in text
    assert "/home" not in text


def test_data_is_named_by_argument_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(record.DATA, raising=False)
    with pytest.raises(SystemExit, match="--data"):
        record.data_file(None, "a.txt")
    (tmp_path / "a.txt").write_text("a")
    assert record.data_file(tmp_path, "a.txt") == (tmp_path / "a.txt").resolve()
    monkeypatch.setenv(record.DATA, str(tmp_path))
    assert record.data_file(None, "a.txt").name == "a.txt"
    with pytest.raises(SystemExit, match=r"b\.txt is not in the data folder"):
        record.data_file(None, "b.txt")


def test_peak_memory_is_the_childs_own() -> None:
    ballast = bytearray(200 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])  # touched, so that it is resident here
    idle = cost.measure([sys.executable, "-S", "-c", "pass"])
    busy = cost.measure([sys.executable, "-S", "-c", "x = bytearray(100 << 20); x[::4096] = b'x' * len(x[::4096])"])
    assert idle["returncode"] == busy["returncode"] == 0
    # An empty interpreter takes some 10 to 20 MB; 60 leaves room for any build of it, and is far below the ballast.
    assert idle["peak_rss_bytes"] < 60 << 20
    assert 100 << 20 <= busy["peak_rss_bytes"] < 160 << 20
    assert len(ballast) == 200 << 20


def test_a_failing_program_is_reported() -> None:
    with pytest.raises(SystemExit, match="it went wrong"):
        cost.measure([sys.executable, "-S", "-c", "raise SystemExit('it went wrong')"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_command_that_was_cut_off_costs_what_both_runs_cost(tmp_path: Path) -> None:
    log = tmp_path / "log"
    endless = [sys.executable, "-S", "-c", "while True: pass"]
    with subprocess.Popen([sys.executable, "-S", cost.__file__, "--log", log / "0.json", *endless]) as between:
        try:
            deadline = time.monotonic() + 60
            while not (log / "0.json").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            first = json.loads((log / "0.json").read_text())
        finally:
            children = Path(f"/proc/{between.pid}/task/{between.pid}/children").read_text().split()
            between.kill()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
    whole = cost.measure([sys.executable, "-S", "-c", "sum(range(1 << 22))"], log)
    assert first["returncode"] is None and whole["returncode"] == 0 and whole["runs"] == 2
    assert whole["cpu_seconds"] > first["cpu_seconds"]
    assert whole["peak_rss_bytes"] >= first["peak_rss_bytes"] > 0
    assert cost.measure([sys.executable, "-S", "-c", "pass"], tmp_path / "other")["runs"] == 1


def test_tensors_are_compared_and_not_what_is_said_beside_them(tmp_path: Path) -> None:
    one, two = torch.arange(6.0).view(2, 3), torch.arange(4, dtype=torch.uint8)

    def hashed(name: str, tensors: dict[str, torch.Tensor], **metadata: str) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata=metadata)
        return unchanged.tensors_sha256(tmp_path / name)

    first = hashed("a", {"one": one, "two": two})
    assert hashed("b", {"two": two, "one": one}, format="pt", version="1") == first
    others = [{"one": one}, {"one": one + 1, "two": two}, {"one": one.view(3, 2), "two": two}, {"one": one, "tow": two}]
    assert len({first, *(hashed(f"c{i}", tensors) for i, tensors in enumerate(others))}) == 5

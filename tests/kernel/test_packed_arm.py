"""The kernels for ARM, cross-compiled and under an emulator, against the portable ones; the same program on this one.

What they compute is tested here; how fast they are cannot be.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitfloor.ops import packed_native

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "packed"
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-static", "-w")
CROSS = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
# An ARMv8.0 processor without SDOT, and everything that the emulator knows; and the best level of each.
PROCESSORS = {"cortex-a53": 1, "max": 2}

Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles the program, once for a compiler."""
    made: dict[str, Path] = {}

    def compiled(compiler: str) -> Path:
        if compiler not in made:
            program = tmp_path_factory.mktemp("agree") / "agree"
            sources = [str(HERE / "native" / "agree.cpp"), *map(str, sorted(SOURCES.glob("*.cpp")))]
            subprocess.run([compiler, *FLAGS, *sources, "-o", str(program)], check=True)
            made[compiler] = program
        return made[compiler]

    return compiled


def lines_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the program printed: the first word of every line to the rest."""
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.full
def test_the_sets_of_this_machine_agree(build: Build) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    found = lines_of(subprocess.run([build(compiler)], capture_output=True, text=True))
    assert len(found) == 2 + int(found["level"])


@pytest.mark.full
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_sets_of_arm_agree(processor: str, build: Build) -> None:
    compiler = shutil.which(CROSS)
    emulator = next((path for name in EMULATORS if (path := shutil.which(name))), None)
    if compiler is None or emulator is None:
        pytest.skip(f"there is no {CROSS} or no {EMULATORS[0]} (Debian: g++-aarch64-linux-gnu and qemu-user)")
    command = [emulator, "-cpu", processor, str(build(compiler))]
    found = lines_of(subprocess.run(command, capture_output=True, text=True))
    assert int(found["level"]) == PROCESSORS[processor] and len(found) == 2 + PROCESSORS[processor]
    if (own := shutil.which(os.environ.get("CXX", "c++"))) and platform.machine() == "x86_64":
        here = lines_of(subprocess.run([build(own)], capture_output=True, text=True))
        assert found["portable"] == here["portable"]  # plain C++ rounds the same everywhere


@pytest.mark.parametrize(("machine", "best"), [("aarch64", "dotprod"), ("arm64", "dotprod"), ("x86_64", "avx512")])
def test_instruction_sets_have_the_names_of_the_processor(
    machine: str, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    spec = importlib.util.spec_from_file_location("packed_native_elsewhere", packed_native.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "packed_native_elsewhere", module)  # dataclasses ask for it
    spec.loader.exec_module(module)
    assert module.LEVELS[0] == "portable" and module.LEVELS[-1] == best and len(module.LEVELS) == 3

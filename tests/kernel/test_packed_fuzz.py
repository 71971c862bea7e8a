"""The C interface of the packed kernels under sanitizers (``make sanitize``), and a few of its promises without."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from bitfloor.core.errors import InputError
from bitfloor.ops import packed_native
from bitfloor.ops.form import read_form

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "packed"
FLAGS = ("-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread", "-w")
PROGRAMS = {"packed_fuzz": 300, "decoder_fuzz": 60}  # rounds


def compiler(sanitizers: list[str], folder: Path) -> str:
    """A C++ compiler whose programs run with the sanitizers."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("there is no C++ compiler")
    program = folder / "nothing"
    made = [found, *sanitizers, "-x", "c++", "-", "-o", str(program)]
    if (
        subprocess.run(made, input="int main() {}", text=True, capture_output=True).returncode
        or subprocess.run([program], capture_output=True).returncode
    ):
        pytest.skip(f"programs with {sanitizers[0]} cannot be built or do not run here")
    return found


@pytest.mark.full
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_nothing_is_read_or_written_that_is_not_there_or_not_ours(kind: str, tmp_path: Path) -> None:
    sanitizers = [f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    compile_with = [compiler(sanitizers, tmp_path), *FLAGS, *sanitizers]
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        subprocess.run([*compile_with, "-c", str(source), "-o", objects[-1]], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    for name, rounds in PROGRAMS.items():
        own, program = Path(__file__).with_name(f"{name}.cpp"), tmp_path / name
        subprocess.run([*compile_with, f"-I{SOURCES}", str(own), *objects, "-o", str(program)], check=True)
        for seed in range(2):
            done = subprocess.run([program, str(rounds), str(seed)], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stderr[-4000:]}"


def test_a_form_is_refused_by_both_sides_or_by_none() -> None:
    found = packed_native.load().library
    if found is None:
        pytest.skip("the packed kernels were not built")
    make = found._library.bitfloor_packed_plan
    source = random.Random(0)
    good = [33, 70, 0, 0, 16, 1, 0, 40, 3, 16, 0, 0, 1, 30, 8, 64, 2, -3, 0]
    seen = set()
    for _ in range(3000):
        form = list(good)
        for _ in range(source.randrange(3)):
            form[source.randrange(len(form))] = source.choice([-1, 0, 1, 2, 3, 7, 9, 70, 1 << 31, 1 << 62, -(1 << 62)])
        numbers = (ctypes.c_int64 * len(form))(*form)
        taken = make(numbers, len(form), None, 0) > 0
        try:
            read_form(tuple(form))
            expected = True
        except InputError:
            expected = False
        assert taken == expected, form
        seen.add(taken)
    assert seen == {True, False}

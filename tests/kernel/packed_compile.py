"""Compiles the packed kernels for GPUs that need not be there. A program, because Triton interprets in the tests.

    python tests/kernel/packed_compile.py ARCHITECTURE [few|all]

Calls the library with tensors on the CPU under a driver that only says which GPU to compile for; every launch stops
after compiling, exactly the kernels that the calls would launch. Prints one JSON line for each: kernel, what was asked
for, bytes of machine code, registers and bytes of stack of a thread, which instructions occur, and how the threads
share what is summed.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from packed_cases import matrix, stored
from triton.backends.compiler import GPUTarget

from bitfloor.ops import launch
from bitfloor.ops.form import read_form
from bitfloor.ops.triton import launches, packed
from bitfloor.ops.triton.activations import input_kernel, rotate_kernel
from bitfloor.ops.triton.dense import gemm_kernel, rows_kernel
from bitfloor.ops.triton.gemv import gemv_kernel
from bitfloor.ops.triton.parts import Matrix

KERNELS = (input_kernel, rotate_kernel, gemm_kernel, rows_kernel, gemv_kernel)
INSTRUCTIONS = ("dp4a", "mma.sync", "wgmma")
PROCESSORS = 132  # of the GPU that launches are planned for


class Driver:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no GPU to ask for {name}")


def resources(compiled: Any) -> tuple[int, int] | None:
    """Registers and bytes of stack of a thread, if the tool that tells is there."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return None if found is None else (int(found[1]), int(found[2]))


def report(name: str, asked: dict[str, Any], compiled: Any, half: bool) -> None:
    """Print what came of a launch; ``half`` is false where ``x`` is float32 on its way to tensor cores."""
    ptx = compiled.asm["ptx"]
    row = {"kernel": name, "asked": asked, "bytes": len(compiled.asm["cubin"]), "resources": resources(compiled)}
    row["half"] = half
    ir = compiled.asm["ttgir"]
    names = sorted(set(re.findall(r'"tt.reduce".*?\}\) : \(tensor<[^>]*?(#\w+)>\)', ir, re.DOTALL)))
    row["layouts"] = [found for name in names for found in re.findall(rf"^{name} = (.*)$", ir, re.M)]
    row["instructions"] = [word for word in INSTRUCTIONS if word in ptx]
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def only_compile() -> None:
    """Have every launch stop after compiling, and report each kernel once."""
    seen: set[int] = set()
    for kernel in KERNELS:

        def run(*given: Any, _run: Any = kernel.run, _name: str = kernel.__name__, **named: Any) -> None:
            named["warmup"] = True
            compiled = _run(*given, **named)
            if id(compiled) not in seen:
                seen.add(id(compiled))
                asked = {key: value for key, value in named.items() if isinstance(value, (int, str))}
                report(_name, asked, compiled, _name != "gemm_kernel" or given[0].dtype != torch.float32)

        kernel.run = run


def cases(everything: bool) -> Iterator[tuple[dict[str, Any], int, torch.dtype]]:
    """Arguments of :func:`packed_cases.matrix`, rows of ``x``, and their dtype."""
    half = torch.float16
    plain = {"rows": 4096, "group_size": 64}
    mixed: dict[str, Any] = {"split": [(128, 1), (192, 2), (256, 3)], "order": 1, "rotation": 64, "channels": True}
    yield {**plain, "split": [(576, 4)]}, 1, half
    yield {**plain, "split": [(576, 3)]}, 200, half
    if not everything:
        return
    for bits, zero, rows in itertools.product((1, 2, 3, 4, 5, 6, 8), ("packed", "offset", "centre"), (1, 2, 4, 8, 16)):
        yield {**plain, "split": [(576, bits)], "zero": zero}, rows, half
    for bits, rows, dtype in itertools.product((1, 3, 8), (64, 200), (half, torch.bfloat16, torch.float32)):
        yield {**plain, "split": [(576, bits)], "dtype": torch.bfloat16}, rows, dtype
        yield {**plain, "split": [(570, bits)], "group_size": 24}, rows, dtype
    for rows, dtype, rotation in itertools.product((1, 8, 16, 200), (half, torch.float32), (0, 2, 1024)):
        yield {**plain, **mixed, "channel_scale": rotation != 2, "rotation": rotation}, rows, dtype
    # From tall matrices on, programs take more rows.
    yield {"rows": 20000, "group_size": 64, "split": [(576, 4)]}, 200, half


def main() -> None:
    """Compile everything."""
    architecture, everything = int(sys.argv[1]), sys.argv[2:] == ["all"]
    triton.runtime.driver.set_active(Driver(architecture))
    launches.processors = lambda device: PROCESSORS  # type: ignore[assignment]
    only_compile()
    library = packed.PackedTriton()
    for asked, rows, dtype in cases(everything):
        parts, form = stored(matrix(**asked))
        known = read_form(tuple(form))
        x = torch.ones(rows, known.shape[1], dtype=dtype)
        library.linear(x, parts, torch.ones(known.shape[0]), known, int8=False)
        launches.dense(Matrix.of(known, parts), dtype, count=64)
        if not everything:
            continue
        if rows <= launch.FEW_ROWS:
            library.linear(x, parts, None, known, int8=True)
            library.product(library.stored_input(x, parts, known), parts, None, known, int8=False)
        library.embedding(torch.arange(3), parts, known, dtype)


if __name__ == "__main__":
    main()

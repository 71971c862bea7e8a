"""How fast things run here: a packed model beside half precision, or the packed kernels by themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitfloor.pipeline.memory import available_memory
from bitfloor.runtime import kernel_speed
from bitfloor.runtime.speed import SpeedOptions, bench_model

AnyPath = str | os.PathLike[str]


def bench(
    folder: AnyPath,
    *,
    baseline: AnyPath | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 3,
    threads: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Tokens a second of a packed model on the CPU, beside half precision and a plain read of memory.

    Args:
        folder: made by :func:`quantize`.
        baseline: float model to compare with; None for random weights of the same shape, where memory allows.
        prompt_tokens: read at once, fewer if the model's context is shorter; then ``new_tokens`` one by one.
        rounds: of which the best counts; all take turns.
        threads: None for as many as torch uses.
        say: is told what is being done.

    Returns:
        The document of ``bitfloor bench --json`` (docs/cli.md).

    Raises:
        InputError: not a bitfloor checkpoint, or options that make no sense.
    """
    name = None if baseline is None else os.fspath(baseline)
    options = SpeedOptions(prompt_tokens, new_tokens, rounds, threads, name, available_memory("cpu"))
    return bench_model(Path(folder), options, say)


def bench_kernels(
    *, threads: int | None = None, seconds: float = 3, rounds: int = 5, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Bytes a second of the packed kernels of the CPU, every case of widths, beside a plain read and bfloat16.

    Args:
        threads: None for as many as torch uses.
        seconds: for every case, in ``rounds`` parts.
        say: is told what is being measured.

    Raises:
        InputError: there are no packed kernels here.
    """
    return kernel_speed.bench_kernels([threads or torch.get_num_threads()], seconds, rounds, say)

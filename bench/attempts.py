"""Attempts at one quantization that can be killed: forks of this process, watched from outside.

``determinism.py`` says why forks, and what is made of them.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL = ".bitfloor"


@dataclass(frozen=True)
class Trial:
    """One command: what is quantized, how, and what its uninterrupted run gives.

    Args:
        work: folder that paths are relative to.
        model: folder of the model, relative.
        text: calibration text, relative.
        recipe: name of the preset.
        overrides: of the recipe.
        parts: journal files of a full run.
    """

    work: Path
    model: str
    text: str
    recipe: str
    overrides: tuple[str, ...]
    parts: int = 0


def single_thread() -> None:
    """Import everything with one thread, so that forking is safe.

    Raises:
        SystemExit: some library started a thread nevertheless.
    """
    import torch

    torch.set_num_threads(1)
    from bitfloor import api

    assert api.quantize
    check_single_thread()


def check_single_thread() -> None:
    """Refuse to fork a process that has threads: a lock one of them holds would never be released in the child.

    Raises:
        SystemExit: some library started a thread nevertheless.
    """
    tasks = Path("/proc/self/task")
    if tasks.is_dir() and len(list(tasks.iterdir())) != 1:
        raise SystemExit("a library started a thread, so forking is not safe here")


def start(trial: Trial, out: str) -> int:
    """Fork a child that quantizes into ``out``; its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:  # nothing may escape from here: the child must not become a second copy of this program
        os.setsid()
        with (trial.work / "attempt.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                os.chdir(trial.work)
                from bitfloor import api

                api.quantize(trial.model, out, trial.recipe, overrides=list(trial.overrides), calibration=trial.text)
                status = 0
            except BaseException:
                traceback.print_exc(file=log)
    finally:
        os._exit(status)


def ended(child: int) -> bool:
    """Whether a child has ended by itself.

    Raises:
        SystemExit: it failed; an attempt that is not killed must succeed.
    """
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        raise SystemExit(f"an attempt failed with status {os.waitstatus_to_exitcode(status)}; see attempt.log")
    return bool(found)


def finish(trial: Trial, out: str) -> tuple[float, float]:
    """Run an attempt to its end; seconds in all, and seconds of them after the last part was written."""
    began = time.perf_counter()
    child = start(trial, out)
    merging = None
    while not ended(child):
        if merging is None and parts_there(trial.work / out) >= trial.parts:
            merging = time.perf_counter()
        time.sleep(0.0005)
    now = time.perf_counter()
    return now - began, now - (merging or now)


def attempt(trial: Trial, out: str, mode: str, delay: float, linger: float) -> bool:
    """Start an attempt and kill it.

    Args:
        trial: the command.
        out: output folder, relative.
        mode: ``"moment"``, ``"write"`` or ``"merge"``.
        delay: seconds before the kill, or before looking for a temporary file.
        linger: seconds to wait once the merge has begun (mode ``merge``).

    Returns:
        True if it finished before the kill.
    """
    folder = trial.work / out
    child = start(trial, out)
    deadline = time.perf_counter() + delay
    merging: float | None = None
    while True:
        if ended(child):
            return True
        now = time.perf_counter()
        if mode == "merge":
            if merging is None and parts_there(folder) >= trial.parts:
                merging = now
            due = merging is not None and now - merging >= linger
        else:
            due = now >= deadline and (mode == "moment" or any(temporaries(folder)))
        if due:
            break
        time.sleep(0.0001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def parts_there(folder: Path) -> int:
    """Finished files of the journal."""
    try:
        return sum(1 for name in os.listdir(folder / JOURNAL) if name.endswith(".safetensors"))
    except FileNotFoundError:
        return 0


def temporaries(folder: Path) -> Iterator[str]:
    """Names of files that are being written."""
    for place in (folder, folder / JOURNAL):
        try:
            yield from (name for name in os.listdir(place) if name.endswith(".tmp"))
        except FileNotFoundError:
            continue


def classify(folder: Path, parts: int) -> dict[str, Any] | None:
    """What a kill hit, from what is left in the folder; None when it came before there was one."""
    if not folder.exists():
        return None
    there = parts_there(folder)
    if (folder / "config.json").exists():
        stage = "removing the journal" if (folder / JOURNAL).exists() else "after the end"
    elif not (folder / JOURNAL).exists():
        stage = "before the journal"
    else:
        stage = "merging" if there >= parts else "blocks"
    return {"stage": stage, "parts_finished": there, "inside_write_of": sorted(temporaries(folder))}

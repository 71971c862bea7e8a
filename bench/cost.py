"""What a program costs: its CPU seconds and its peak resident memory, measured from outside.

Run as a program, ``python cost.py COMMAND ...`` prints a JSON line with the command's exit status, peak resident
memory, CPU seconds and wall-clock seconds. It is a process of its own for a reason, see :func:`measure`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

EVERY = 5.0  # seconds between two notes of what a run costs


def cpu_seconds() -> float:
    """User and system time of this process, its threads and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(arguments: Sequence[str | os.PathLike[str]], log: Path | None = None, **options: Any) -> dict[str, Any]:
    """Run a program and say what it cost: ``returncode``, ``peak_rss_bytes``, ``cpu_seconds``, ``wall_seconds``.

    Linux hands the peak of the process that forks to the one it starts (the mark survives ``exec``): a parent that
    holds a model would report its own peak as the child's. So a small process stands between, this file as a program.

    Args:
        arguments: the command.
        log: a folder for what this run costs while it costs it. If the command can be cut off and go on later, so
            can its measurement: what earlier runs left there is added, all but their last seconds, and ``runs`` says
            how many there were.
        options: for ``subprocess.run``: ``cwd``, ``env``.

    Raises:
        SystemExit: the program failed; the last lines it said are in the message.
    """
    earlier = [] if log is None else [json.loads(path.read_text("utf-8")) for path in sorted(log.glob("*.json"))]
    own = [] if log is None else ["--log", str(log / f"{len(earlier)}.json")]
    between = [sys.executable, "-S", str(Path(__file__).resolve()), *own, *map(os.fspath, arguments)]
    done = subprocess.run(between, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"measuring failed:\n{done.stderr[-2000:]}")
    cost: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if cost["returncode"]:
        last = "\n".join(done.stderr.splitlines()[-15:])
        raise SystemExit(f"{' '.join(record.command(list(map(os.fspath, arguments))))} failed:\n{last}")
    return cost if log is None else together([*earlier, cost])


def together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cost of a command that was cut off and went on."""
    found = {key: round(sum(run[key] for run in runs), 2) for key in ("cpu_seconds", "wall_seconds")}
    peak = max(run["peak_rss_bytes"] for run in runs)
    return {"returncode": runs[-1]["returncode"], "peak_rss_bytes": peak, **found, "runs": len(runs)}


def bitfloor_command(*arguments: str | os.PathLike[str]) -> list[str]:
    """The command line program with the interpreter that runs now, whether installed or from the source tree."""
    start = "from bitfloor.cli.main import run; run()"
    return [sys.executable, "-c", start, *map(os.fspath, arguments)]


def source_environment(**changes: str) -> dict[str, str]:
    """The environment for a child that must find this package."""
    path = os.pathsep.join(filter(None, [str(record.ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **changes}


def so_far(process: int, began: float) -> dict[str, Any]:
    """What a running process has cost (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    peak = next(
        line for line in Path(f"/proc/{process}/status").read_text("ascii", "replace").splitlines() if "HWM" in line
    )
    return {
        "returncode": None,
        "peak_rss_bytes": int(peak.split()[1]) * 1024,
        "cpu_seconds": round(sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"), 2),
        "wall_seconds": round(time.perf_counter() - began, 2),
    }


def _watch(child: subprocess.Popen[bytes], log: Path, began: float) -> None:
    """Write down what the child costs every few seconds, in a file that is whole at any time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    part = log.with_suffix(".part")
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            part.write_text(json.dumps(so_far(child.pid, began)), encoding="utf-8")
            part.replace(log)
        except (OSError, StopIteration):  # it ends just now
            pass
        time.sleep(EVERY)


def _stand_between(arguments: Sequence[str]) -> None:
    log = Path(arguments[1]) if arguments[0] == "--log" else None
    began = time.perf_counter()
    child = subprocess.Popen(arguments if log is None else arguments[2:], stdout=subprocess.DEVNULL)
    if log is not None:
        _watch(child, log, began)
    _, status, usage = os.wait4(child.pid, 0)
    cost = {
        "returncode": os.waitstatus_to_exitcode(status),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_seconds": round(time.perf_counter() - began, 2),
    }
    sys.stdout.write(json.dumps(cost) + "\n")


if __name__ == "__main__":
    _stand_between(sys.argv[1:])

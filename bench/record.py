"""What every measurement here keeps with its numbers, and what makes a number stale.

A result is a JSON file under ``bench/results`` that begins with :func:`header`: the command, the versions, the commit,
the machine, the date and the hash of the code that the numbers depend on. A result is *stale* when that code, or the
resolved recipe, is no longer the one it was measured with (:func:`stale`); ``tables.py --check`` refuses stale files.

The hash is taken over syntax trees without docstrings, comments and the words of error messages: rewording does not
cost a night of measuring, changing a constant does.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "bitfloor"
RESULTS = ROOT / "bench" / "results"
NOTE = "BITFLOOR_BENCH_NOTE"  # anything else about the machine that a reader should know
DATA = "BITFLOOR_BENCH_DATA"

# Where the numbers of a quality measurement come from, whatever the method: the block loop, and the scoring. The
# method's own files come on top (:func:`quality`), so that a new method makes no old number stale.
EVERY_METHOD = (
    "core",
    "calib",
    "ops/reference.py",
    "pipeline/job.py",
    "pipeline/run.py",
    "pipeline/ends.py",
    "formats/native.py",
    "data",
    "runtime/linear.py",
    "evaluation/perplexity.py",
)
METHOD_FOLDERS = ("methods/", "solvers/", "ops/")
# What options there are and what they may be; which values were used is in the recipe's own hash.
UNCOUNTED = ("methods/options.py", "methods/table.py")
# The last stage, where a recipe has one.
TUNING = ("pipeline/tune.py", "pipeline/student.py", "pipeline/whole.py", "solvers/scales.py", "solvers/adamw.py")
# A fine-tune between two quantizations.
RESTORING = (
    "pipeline/lessons.py",
    "pipeline/restore.py",
    "pipeline/restored.py",
    "pipeline/student.py",
    "pipeline/whole.py",
    "modeling/adapters.py",
)
# Finding widths by group, where a recipe does; their solvers are those that these import.
ALLOCATING = (
    "methods/allocation.py",
    "pipeline/allocate.py",
    "pipeline/budget.py",
    "pipeline/choice.py",
    "pipeline/survey.py",
    "pipeline/survey_ends.py",
)
ALLOCATORS = ("solvers/budget.py", "solvers/salience.py", "solvers/slim_bits.py")
# Rounding a head towards its logits, where a recipe does.
HEAD = (
    "pipeline/head.py",
    "pipeline/whole.py",
    "pipeline/student.py",
    "methods/gptq.py",
    "solvers/gptq.py",
    "solvers/descent.py",
    "solvers/ranges.py",
)
# Memory and resuming depend on how tensors are read, held and written too.
RUNNING = ("pipeline", "formats", "modeling")


# -- the code ---------------------------------------------------------------------------------------------------------


def quality(method: str, package: Path = PACKAGE) -> tuple[str, ...]:
    """The parts of the package that a method's results depend on: those of every method, and what its file imports.

    Args:
        method: name of a method, which is the name of its file.
        package: the package's folder.
    """
    found: set[str] = set()
    waiting = [f"methods/{method}.py", "pipeline/ends.py"]
    while waiting:
        part = waiting.pop()
        if part in found:
            continue
        found.add(part)
        waiting += [name for name in imported(package / part, package) if name.startswith(METHOD_FOLDERS)]
    return (*EVERY_METHOD, *sorted(found - {*EVERY_METHOD, *UNCOUNTED}))


def imported(path: Path, package: Path = PACKAGE) -> list[str]:
    """Modules of the package that a file imports, as paths relative to the package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = (name.split(".")[1:] for name in names if name.split(".")[0] == package.name)
    files = ("/".join(words) + ".py" for words in inside if words)
    return sorted(name for name in files if (package / name).is_file())


def code_sha256(parts: Iterable[str], package: Path = PACKAGE) -> str:
    """Hash over the syntax trees of some files and folders of the package.

    Args:
        parts: relative to the package; a folder stands for every Python file below it.
        package: the package's folder.

    Raises:
        SystemExit: a part that does not exist.
    """
    files: set[Path] = set()
    for part in parts:
        path = package / part
        if not path.exists():
            raise SystemExit(f"{part} is not part of the package, so its code cannot be hashed; see bench/record.py")
        files.update(path.rglob("*.py") if path.is_dir() else [path])
    files -= {package / name for name in UNCOUNTED}
    digest = hashlib.sha256()
    for path in sorted(files):
        tree = tree_text(path.read_text("utf-8"))
        digest.update(f"{path.relative_to(package).as_posix()}\n{tree}\n".encode())
    return digest.hexdigest()


def tree_text(source: str) -> str:
    """What a module does, as text: its syntax tree without positions, docstrings and the words of exceptions.

    ``ast.dump`` is not used: its output differs between Python versions.
    """
    return _dump(ast.parse(source))


def _dump(node: Any) -> str:
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, ast.Raise):
        return "Raise()"  # a number that was produced did not come from an exception
    if isinstance(node, ast.AST):
        fields = {name: _dump(value) for name, value in ast.iter_fields(node)}
        inner = ",".join(f"{name}={text}" for name, text in fields.items() if text)
        return f"{type(node).__name__}({inner})"
    if isinstance(node, list):
        kept = [_dump(item) for item in node if not _is_prose(item)]
        return f"[{','.join(kept)}]" if kept else ""
    return "" if node is None else repr(node)


def _is_prose(node: Any) -> bool:
    """A docstring, of whatever it may be: a string that stands alone as a statement."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def recipe_sha256(preset: str, overrides: Iterable[str] = (), calibration: str | None = None) -> str:
    """Hash of a preset with every default filled in. ``calibration`` is a file name: paths must not be in a hash."""
    from bitfloor.recipe.load import load_recipe

    return load_recipe(preset, list(overrides), calibration=calibration).sha256()


def parts_of(preset: str, overrides: Iterable[str] = ()) -> tuple[str, ...]:
    """The parts of the package that a preset's results depend on: its method's, and those of the stages that it has."""
    from bitfloor.recipe.load import load_recipe

    recipe = load_recipe(preset, list(overrides))
    parts = quality(recipe.method.name)
    more = () if recipe.restore is None else (*RESTORING, "solvers/adamw.py")
    more += (() if recipe.tune is None else TUNING) + (() if recipe.allocation is None else (*ALLOCATING, *ALLOCATORS))
    more += HEAD if recipe.head.rounding == "gptq" else ()
    return tuple(dict.fromkeys((*parts, *more)))


# -- the header of a result -------------------------------------------------------------------------------------------


def header(parts: Sequence[str]) -> dict[str, Any]:
    """Command, versions, commit, machine, code and date: the first keys of every result."""
    return {
        "command": command(sys.argv),
        "versions": versions(),
        **commit(),
        "machine": machine(),
        "code": {"parts": list(parts), "sha256": code_sha256(parts)},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def command(arguments: Sequence[str]) -> list[str]:
    """A command line with every path cut to its last part."""
    return [_cut(argument) for argument in arguments]


def _cut(argument: str) -> str:
    start, equals, value = argument.partition("=")
    if equals and not start.startswith(("/", ".")):
        return f"{start}={_cut(value)}"
    return Path(argument).name if "/" in argument else argument


def versions(packages: Iterable[str] = ("torch", "transformers", "bitfloor")) -> dict[str, str]:
    """Versions of Python and of some packages; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "bitfloor" not in found:  # run from the source tree
        text = (ROOT / "pyproject.toml").read_text("utf-8")
        found["bitfloor"] = text.split('\nversion = "', 1)[1].split('"', 1)[0]
    return found


def commit() -> dict[str, Any]:
    """The commit, and whether the package or the scripts differ from it (results themselves do not count)."""
    head = _git("rev-parse", "--verify", "HEAD")
    changes = _git("status", "--porcelain", "--", "src", "bench", ":!bench/results")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, and the instruction set torch uses. No names of hosts."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **({"note": os.environ[NOTE]} if os.environ.get(NOTE) else {}),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# -- files ------------------------------------------------------------------------------------------------------------


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        SystemExit: it is missing or not JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path.name} cannot be read ({error}); run the script that makes it") from error
    return content


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stale(path: Path, package: Path = PACKAGE) -> str | None:
    """Why a result no longer describes the code, or None if it does.

    Results without ``code`` (other software, the float model) depend on no code of the package. ``recipe`` is looked up
    again and must have the same hash; ``inputs`` are other results, which must be the files it was computed from.
    """
    content = read_result(path)
    code = content.get("code")
    if code is not None:
        missing = [part for part in code["parts"] if not (package / part).exists()]
        if missing or not _same_code(path, code, code_sha256(code["parts"], package)):
            return "the code has changed since it was measured"
    recipe = content.get("recipe")
    if recipe is not None:
        now = recipe_sha256(recipe["preset"], recipe["overrides"], recipe["calibration"])
        if now != recipe["sha256"]:
            return f"the recipe {recipe['preset']} has changed since it was measured"
    for name, digest in content.get("inputs", {}).items():
        source = path.parent / name
        if not source.is_file() or file_sha256(source) != digest:
            return f"{name}, which it was computed from, has changed"
    return None


def _same_code(path: Path, code: Mapping[str, Any], now: str) -> bool:
    """Whether a result's code is the present one, or was shown to give the same bytes (``unchanged.py``)."""
    shown = path.parent.parent / "unchanged.json"
    pairs = read_result(shown)["pairs"] if path.parent.name == "yardstick" and shown.is_file() else []
    steps = {
        pair["was"]: pair["is"] for pair in pairs if pair["result"] == path.stem and pair["parts"] == code["parts"]
    }
    reached, seen = code["sha256"], set()
    while reached != now and reached in steps and reached not in seen:
        seen.add(reached)
        reached = steps[reached]
    return bool(reached == now)


def data_file(folder: Path | None, name: str) -> Path:
    """A file of the data folder: the one given, else the one that the environment names.

    Raises:
        SystemExit: neither is given, or the file is not there.
    """
    named = folder or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    if named is None:
        raise SystemExit(f"give the folder of the texts with --data, or set {DATA} (docs/measuring.md)")
    path = (named / name).resolve()
    if not path.is_file():
        raise SystemExit(f"{name} is not in the data folder (docs/measuring.md lists what must be there)")
    return path

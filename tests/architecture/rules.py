"""The house rules that a program can check, as functions from the modules of the package to complaints.

Each rule looks at syntax trees only, so imports inside functions and dynamic imports of constant names count too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "bitfloor"

# Imports point down only, and never sideways into another folder of the same level (docs: the design's table).
LEVELS = {
    "core": 0,
    "ops": 1,
    "solvers": 2,
    "calib": 2,
    "modeling": 2,
    "formats": 2,
    "data": 2,
    "methods": 3,
    "runtime": 3,
    "evaluation": 3,
    "pipeline": 4,
    "recipe": 5,
    "scoring": 5,
    "planning": 5,
    "benching": 5,
    "talking": 5,
    "serving": 5,
    "environment": 5,
    "api": 6,
    "cli": 7,
    # The package itself is a lazy face of the api; its plug-in names the module that registers with transformers.
    "_plugin": 6,
    "__init__": 7,
    "__main__": 8,
}

# Where a third-party package may be imported: folders end in "/", files do not. Everything else is refused.
HOMES: dict[str, tuple[str, ...]] = {
    "transformers": ("modeling/", "runtime/", "data/tokenize.py", "evaluation/"),
    "safetensors": ("formats/", "modeling/loader.py"),
    "pydantic": ("recipe/",),
    "pydantic_core": ("recipe/",),
    "yaml": ("recipe/",),
    "typer": ("cli/",),
    "click": ("cli/",),
    "rich": ("cli/",),
    "triton": ("ops/triton/",),
    "starlette": ("serving/",),
    "uvicorn": ("serving/",),
}
# Optional extras and conveniences: wherever they are needed, but in one file only.
ONE_SITE = ("gguf", "pyarrow", "datasets", "accelerate", "huggingface_hub", "numpy", "peft", "starlette", "uvicorn")
# These must start fast; what they need of torch they reach through the api, inside a command.
WITHOUT_TORCH = ("cli/", "recipe/", "core/headers.py", "formats/layout.py", "formats/atomic.py", "_plugin.py")

BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "tools"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 100
MAX_PARAMETERS = 7


@dataclass(frozen=True)
class Module:
    """One source file.

    Args:
        path: relative to the package, with forward slashes: ``"formats/native.py"``.
        text: its source.
    """

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The folder, or the module for a file at the top."""
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def dotted(self) -> list[str]:
        """Names of the package the module lives in, for relative imports."""
        return [PACKAGE, *self.path.split("/")[:-1]]


def modules_of(root: Path) -> list[Module]:
    """Every Python file below the package folder."""
    return [Module(path.relative_to(root).as_posix(), path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))]


def imports(module: Module) -> Iterator[str]:
    """Dotted names of everything a module imports; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.dotted[: len(module.dotted) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def wrong_levels(modules: Iterable[Module]) -> list[str]:
    """Imports that point up or sideways, and folders that have no level."""
    found = []
    for module in modules:
        if module.room not in LEVELS:
            found.append(f"{module.path}: {module.room} has no level")
            continue
        for name in imports(module):
            parts = name.split(".")
            if parts[0] != PACKAGE or len(parts) < 2 or parts[1] == module.room or parts[1] not in LEVELS:
                continue
            if LEVELS[parts[1]] >= LEVELS[module.room]:
                found.append(f"{module.path} (level {LEVELS[module.room]}) imports {name} (level {LEVELS[parts[1]]})")
    return found


def wrong_homes(modules: Iterable[Module]) -> list[str]:
    """Third-party packages outside the rooms that own them."""
    found = []
    for module in modules:
        for name in imports(module):
            package = name.split(".")[0]
            if package in HOMES and not module.path.startswith(HOMES[package]):
                found.append(f"{module.path} imports {name}; it belongs in {', '.join(HOMES[package])}")
            if package == "torch" and module.path.startswith(WITHOUT_TORCH):
                found.append(f"{module.path} imports {name}, but must start without torch")
    return found


def scattered_extras(modules: Iterable[Module]) -> list[str]:
    """Packages with more than one import site."""
    sites: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        for name in imports(module):
            if name.split(".")[0] in ONE_SITE:
                sites[name.split(".")[0]].add(module.path)
    return [f"{name} is imported in {', '.join(sorted(paths))}" for name, paths in sites.items() if len(paths) > 1]


def too_large(modules: Iterable[Module]) -> list[str]:
    """Files and functions over the hard limits."""
    found = []
    for module in modules:
        count = len(module.text.splitlines())
        if count > MAX_LINES:
            found.append(f"{module.path} has {count} lines")
        for function in functions(module):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{module.path}: {function.name} has {length} lines")
    return found


def too_many_parameters(modules: Iterable[Module], exempt: Mapping[str, str]) -> list[str]:
    """Functions with more than seven parameters, keyword-only ones included, ``self`` and ``cls`` not.

    Args:
        modules: the package.
        exempt: ``"path:function"``, or a folder ending in "/", to the reason why it may have more. An exemption that
            nothing needs any more is a complaint too.
    """
    found, used = [], set()
    for module in modules:
        for function in functions(module):
            count = len([name for name in parameters(function) if name not in ("self", "cls")])
            if count <= MAX_PARAMETERS:
                continue
            reasons = [
                key
                for key in exempt
                if key == f"{module.path}:{function.name}" or (key.endswith("/") and module.path.startswith(key))
            ]
            used.update(reasons)
            if not reasons:
                found.append(f"{module.path}: {function.name} has {count} parameters")
    return found + [f"{key} is exempt and need not be" for key in exempt if key not in used]


def unwanted_names(modules: Iterable[Module]) -> list[str]:
    """Files named after nothing."""
    return [
        module.path
        for module in modules
        if BANNED_NAMES & {part.removesuffix(".py").strip("_") for part in module.path.split("/")}
    ]


def stray_prints(modules: Iterable[Module]) -> list[str]:
    """Calls of ``print`` outside the command line."""
    return [
        f"{module.path}:{node.lineno} calls print"
        for module in modules
        if module.room != "cli"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def unannotated(modules: Iterable[Module]) -> list[str]:
    """Functions with a parameter or a result without a type."""
    found = []
    for module in modules:
        for function in functions(module):
            named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            starred = [argument for argument in (function.args.vararg, function.args.kwarg) if argument]
            bare = [a.arg for a in [*named, *starred] if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or function.returns is None:
                found.append(
                    f"{module.path}:{function.lineno} {function.name} lacks types: {', '.join(bare) or 'result'}"
                )
    return found


def undocumented(modules: Iterable[Module]) -> list[str]:
    """Modules, public classes and public functions of modules without a docstring."""
    found = []
    for module in modules:
        tree = module.tree
        if not ast.get_docstring(tree):
            found.append(f"{module.path} has no docstring")
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                found.append(f"{module.path}: {node.name} has no docstring")
    return found


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, nested ones and methods included, but for GPU kernels.

    What ``triton.jit`` compiles is no Python: it has no types, and its parameters are all that it knows.
    """
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of all parameters."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in (*named, arguments.vararg, arguments.kwarg) if argument is not None]

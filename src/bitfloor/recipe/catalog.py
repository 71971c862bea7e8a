"""The presets that ship with the package, and reading YAML without its traps. Light: imports yaml only."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitfloor.core.errors import InputError

PRESETS = Path(__file__).parent / "presets"
SUFFIXES = (".yaml", ".yml")


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: ``1e-3`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Preset:
    """One line of ``bitfloor recipes ls``."""

    name: str
    description: str


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML text.

    Raises:
        InputError: not YAML, with the line, or a key given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{origin} is not valid YAML{line}: {error.problem}; correct it.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{origin} is not valid YAML: {' '.join(str(error).split())}; correct it.") from None


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def presets() -> list[Preset]:
    """Every preset with its one-line description."""
    found = []
    for name in preset_names():
        data = parse_yaml(preset_text(name), name)
        found.append(Preset(name, str(data.get("description", ""))))
    return found


def preset_text(name: str) -> str:
    """The YAML of a preset, comments included.

    Raises:
        InputError: no preset has this name; the closest name and the list are given.
    """
    if name not in preset_names():
        raise unknown_recipe(name)
    return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


def unknown_recipe(name: str) -> InputError:
    """The error for a name that is neither a preset nor a file."""
    names = preset_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return InputError(
        f"no recipe is called {name!r} and no such file exists; {hint}recipes: {', '.join(names)}; "
        "or give the path of a YAML file."
    )


def recipe_text(name_or_path: str) -> str:
    """The YAML text of a preset or of a file; a preset's name comes first.

    Raises:
        InputError: unknown recipe, or a file that cannot be read.
    """
    if name_or_path in preset_names():
        return preset_text(name_or_path)
    path = Path(name_or_path)
    if not path.is_file() and not (path.exists() or path.suffix in SUFFIXES):
        raise unknown_recipe(name_or_path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is not UTF-8 text; give a YAML file.") from None
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}; check the path.") from error

"""From a name or a file, plus overrides, to a checked recipe; and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bitfloor.core.errors import InputError
from bitfloor.recipe.catalog import parse_yaml, recipe_text
from bitfloor.recipe.schema import Recipe, parse_recipe

SHORT = {"bits": "spec.bits", "group_size": "spec.group_size"}


def load_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = (), *, calibration: str | None = None
) -> Recipe:
    """Read a recipe, apply overrides, check everything and fill in the method's own defaults.

    Args:
        recipe: a preset's name, the path of a YAML file, or the same content as a mapping.
        overrides: ``path.to.key=value``, values in YAML; ``bits=`` and ``group_size=`` mean those of ``spec``.
        calibration: replaces ``calibration.text``; wins over an override of the same key.

    Raises:
        InputError: unknown recipe, key, method or option, or a value out of range.
    """
    from bitfloor.recipe.method_options import resolve_options

    parsed, origin = read_recipe(recipe, overrides, calibration=calibration)
    return resolve_options(parsed, origin)


def read_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = (), *, calibration: str | None = None
) -> tuple[Recipe, str]:
    """:func:`load_recipe` without a look at the method's options, so without importing any method.

    Returns:
        The recipe, and what to call its source in messages.
    """
    if isinstance(recipe, Mapping):
        origin, stem = "recipe", "custom"
        data: Any = _copied(recipe)
    else:
        text = os.fspath(recipe)
        origin, stem = f"recipe {text}", Path(text).stem
        data = parse_yaml(recipe_text(text), origin)
    if isinstance(data, dict):
        # The name says what was changed, so that a report never calls a 2-bit model "gptq-w4g64".
        changes = [*overrides] + ([f"calibration.text={calibration}"] if calibration is not None else [])
        data["name"] = " ".join([str(data.get("name") or stem), *changes])
        for override in overrides:
            apply_override(data, override)
        if calibration is not None:
            apply_value(data, "calibration.text", calibration)
    return parse_recipe(data, origin), origin


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted path in nested recipe data, in place. ``layers.0.bits=4`` reaches into a list.

    Raises:
        InputError: no ``=``, an empty path, a path that leads through a value, or a list index that is not there.
    """
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path or not all(path.split(".")):
        raise InputError(f"override {override!r} is not of the form path.to.key=value, for example spec.bits=3.")
    apply_value(data, SHORT.get(path, path), parse_yaml(text, f"the value of override {override!r}"))


def apply_value(data: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path, making the mappings on the way."""
    *parents, last = path.split(".")
    place: Any = data
    for part in parents:
        if isinstance(place, dict) and part not in place:
            place[part] = {}
        place = _step(place, part, path)
        if not isinstance(place, dict | list):
            raise InputError(f"override {path}: {part} is a single value ({place!r}) without keys; shorten the path.")
    if isinstance(place, list):
        _step(place, last, path)
        place[int(last)] = value
    else:
        place[last] = value


def _step(place: Any, part: str, path: str) -> Any:
    if isinstance(place, dict):
        return place[part]
    if not part.isdecimal() or int(part) >= len(place):
        raise InputError(
            f"override {path}: {part!r} is no entry of a list of {len(place)}; count from 0, or give the whole list."
        )
    return place[int(part)]


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; reading it again gives an equal recipe."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text

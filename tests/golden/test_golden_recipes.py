"""Hashes of recipes as they were: results, plans and unfinished runs name them and outlive the version they are of."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from bitfloor.recipe.catalog import preset_names
from bitfloor.recipe.load import load_recipe

RECIPES: dict[str, str] = json.loads(Path(__file__).with_name("recipes.json").read_text("utf-8"))


@pytest.mark.parametrize("line", RECIPES)
def test_a_recipe_keeps_its_hash(line: str) -> None:
    """A key that comes later must not be in the content of recipes that do without it (`Recipe.content`).

    Where a preset is meant to change, or a method's defaults are, write the new hash into ``recipes.json``.
    """
    preset, *overrides = shlex.split(line)
    assert load_recipe(preset, overrides).sha256() == RECIPES[line]


def test_every_preset_is_here() -> None:
    assert set(preset_names()) <= set(RECIPES)

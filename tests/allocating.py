"""Recipes with widths by group, and what they leave in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from integration.test_learned_rounding import hashes

SBA = {"policy": "sba"}
BUDGET = {"policy": "budget", "sequences": 3}
METHODS: list[dict[str, Any]] = [
    {"name": "gptq"},
    {"name": "rtn", "range": "minmax"},
    {"name": "signround", "steps": 4},
    {"name": "bitfloor", "steps": 4, "optimizer": "adamw"},
    {"name": "omniquant", "steps": 4},
]


def mixed(small: dict[str, Any], allocation: dict[str, Any], method: dict[str, Any], **spec: Any) -> dict[str, Any]:
    recipe = {**small, "method": method, "allocation": allocation}
    recipe["spec"] = {"bits": 2, "group_size": 8, **spec}
    return recipe


def plan_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text("utf-8"))
    return found


def tensors(folder: Path) -> dict[str, str]:
    return {name: value for name, value in hashes(folder).items() if name.endswith(".safetensors")}

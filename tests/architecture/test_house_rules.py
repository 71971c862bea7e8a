"""The package keeps the house rules, and every rule can fail."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from architecture import rules
from architecture.rules import Module, modules_of

SPEC = find_spec("bitfloor")
assert SPEC is not None and SPEC.origin is not None
PACKAGE = modules_of(Path(SPEC.origin).parent)

MORE_PARAMETERS = {
    "cli/": "the parameters of a command are its options",
    "api.py:quantize": "the public entry point: what (model, out, recipe) and how, each asked for by the command line",
    "api.py:evaluate": "the public entry point of scoring",
    "api.py:generate": "the public entry point of making text",
    "core/packed.py:pack_segment": "a segment has that many parts",
    "solvers/gptq.py:gptq": "a matrix, what entered it, a grid; every option is a number or a matrix of its own",
    "ops/rounding.py:sign_step": "a kernel: four matrices, a grid and its shape, and a rate",
    "ops/rounding_reference.py:sign_step": "the definition of that kernel",
    "ops/native.py:sign_step": "that kernel in native code",
    "ops/triton/rounding.py:sign_step": "that kernel on a GPU",
}


def exempting(modules: list[Module]) -> list[str]:
    return rules.too_many_parameters(modules, MORE_PARAMETERS)


def without_exemptions(modules: list[Module]) -> list[str]:
    return rules.too_many_parameters(modules, {})


def needless_exemption(modules: list[Module]) -> list[str]:
    return rules.too_many_parameters(modules, {"core/a.py:f": "no reason"})


RULES: list[Callable[[list[Module]], list[str]]] = [
    rules.wrong_levels,
    rules.wrong_homes,
    rules.scattered_extras,
    rules.too_large,
    exempting,
    rules.unwanted_names,
    rules.stray_prints,
    rules.unannotated,
    rules.undocumented,
]


def test_the_whole_package_is_seen() -> None:
    assert {"core/packed.py", "api.py", "__init__.py", "cli/main.py"} <= {module.path for module in PACKAGE}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Callable[[list[Module]], list[str]]) -> None:
    assert rule(PACKAGE) == []


MANY = ", ".join(f"a{i}: int" for i in range(8))
BAD = [
    (rules.wrong_levels, "core/a.py", "from bitfloor.solvers import gptq"),
    (rules.wrong_levels, "core/a.py", "def f():\n    import bitfloor.api"),
    (rules.wrong_levels, "modeling/a.py", "from bitfloor.formats.native import encode"),
    (rules.wrong_levels, "modeling/a.py", "from ..formats import native"),
    (rules.wrong_levels, "pipeline/a.py", "from bitfloor import api"),
    (rules.wrong_levels, "ops/a.py", "from bitfloor.solvers import gptq"),
    (rules.wrong_levels, "solvers/a.py", "from bitfloor.calib.stats import gram"),
    (rules.wrong_levels, "calib/a.py", "import importlib\nimportlib.import_module('bitfloor.modeling.loader')"),
    (rules.wrong_levels, "attic/a.py", ""),
    (rules.wrong_homes, "core/a.py", "import transformers.models"),
    (rules.wrong_homes, "data/sources.py", "def f():\n    from transformers import AutoTokenizer"),
    (rules.wrong_homes, "pipeline/a.py", "import safetensors"),
    (rules.wrong_homes, "modeling/linear.py", "from safetensors.torch import save_file"),
    (rules.wrong_homes, "api.py", "import yaml"),
    (rules.wrong_homes, "formats/a.py", "from pydantic import BaseModel"),
    (rules.wrong_homes, "pipeline/a.py", "from rich.console import Console"),
    (rules.wrong_homes, "recipe/a.py", "import typer"),
    (rules.wrong_homes, "ops/cpu.py", "import triton.language as tl"),
    (rules.wrong_homes, "cli/a.py", "def f():\n    import torch"),
    (rules.wrong_homes, "core/headers.py", "from torch import Tensor"),
    (rules.too_large, "core/a.py", "x = 1\n" * 401),
    (rules.too_large, "core/a.py", "def f():\n" + "    x = 1\n" * 100),
    (without_exemptions, "core/a.py", f"def f({MANY}) -> None: ..."),
    (without_exemptions, "core/a.py", f"class A:\n    def f(self, *, {MANY}) -> None: ..."),
    (needless_exemption, "core/a.py", "def f(a: int) -> None: ..."),
    (rules.unwanted_names, "core/utils.py", ""),
    (rules.unwanted_names, "helpers/a.py", ""),
    (rules.unwanted_names, "core/_common.py", ""),
    (rules.stray_prints, "core/a.py", "def f():\n    print(1)"),
    (rules.unannotated, "core/a.py", "def f(a) -> int: ..."),
    (rules.unannotated, "core/a.py", "def f(*, a: int): ..."),
    (rules.unannotated, "core/a.py", "def f(*a) -> int: ..."),
    (rules.undocumented, "core/a.py", "x = 1"),
    (rules.undocumented, "core/a.py", "'''Words.'''\nclass A: ..."),
]


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_a_rule_can_fail(rule: Callable[[list[Module]], list[str]], path: str, text: str) -> None:
    assert rule([Module(path, text)])


def test_a_second_import_site_is_one_too_many() -> None:
    one, two = Module("data/a.py", "import pyarrow"), Module("data/b.py", "def f():\n    import pyarrow.parquet")
    assert rules.scattered_extras([one]) == []
    assert rules.scattered_extras([one, two]) == ["pyarrow is imported in data/a.py, data/b.py"]


GOOD = [
    Module(
        "methods/a.py", '"""A."""\nfrom bitfloor.core.spec import QuantSpec\nfrom bitfloor.methods.base import Need'
    ),
    Module("modeling/loader.py", '"""A."""\nimport transformers\nfrom safetensors import safe_open'),
    Module("cli/a.py", f'"""A."""\nimport rich\n\n\ndef f({MANY}) -> None:\n    """F."""\n    print(1)'),
]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not exempting], ids=lambda rule: rule.__name__)
def test_a_rule_can_pass(rule: Callable[[list[Module]], list[str]]) -> None:
    assert rule(GOOD) == []

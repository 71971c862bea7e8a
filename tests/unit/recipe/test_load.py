"""Names, files, overrides and method options."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitfloor.core.errors import InputError
from bitfloor.methods.options import Ptq161Config
from bitfloor.recipe.catalog import PRESETS, parse_yaml, preset_names, preset_text, presets
from bitfloor.recipe.load import apply_override, dump_recipe, load_recipe


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS = (
    "rtn",
    "rtn-minmax",
    "gptq",
    "signround",
    "signround-light",
    "signround-best",
    "bitfloor",
    "bitfloor-fast",
    "bitfloor-tuned",
    "omniquant",
)


def test_the_promised_presets_exist() -> None:
    promised = {f"{kind}-w{bits}g64" for kind, bits in itertools.product(KINDS, (2, 3, 4))}
    kinds = ("slim-llm", "slim-llm-plus", "slim-tuned", "bitfloor-mixed")
    mixed = {f"{kind}-w{bits}g64" for kind, bits in itertools.product(kinds, (2, 3))}
    assert promised | mixed | {"gptq-w4g128", "ptq161", "ptq161-restored", "bitfloor-1.61"} == set(preset_names())


@pytest.mark.parametrize("name", [name for name in preset_names() if "161" not in name.replace(".", "")])
def test_a_preset_does_what_its_name_says(name: str) -> None:
    recipe = load_recipe(name)
    kind, _, storage = name.rpartition("-")
    bits, group_size = storage.removeprefix("w").split("g")
    assert (recipe.spec.bits, recipe.spec.group_size) == (int(bits), int(group_size))
    method, _, variant = kind.partition("-")
    policies = {"slim-llm": "sba", "slim-llm-plus": "sba", "slim-tuned": "sba", "bitfloor-mixed": "budget"}
    assert (None if recipe.allocation is None else recipe.allocation.policy) == policies.get(kind)
    methods = {"slim-llm": "gptq", "slim-llm-plus": "omniquant", "slim-tuned": "bitfloor"}
    assert recipe.method.name == methods.get(kind, method)
    if recipe.allocation is not None:
        assert not recipe.spec.symmetric
        published = (recipe.allocation.uniform, recipe.allocation.positional, recipe.allocation.ranges)
        assert published == ((True, False, "gptq") if kind == "slim-tuned" else (False, True, "minmax"))
    if kind in ("slim-tuned", "bitfloor-mixed"):
        plain = load_recipe(f"bitfloor-{storage}")
        # A budget has narrow groups at any mean width.
        narrow = {"centred": 2} if kind == "bitfloor-mixed" else {}
        spec = plain.spec.model_copy(update=narrow)
        assert (recipe.method, recipe.spec, recipe.embedding) == (plain.method, spec, plain.embedding)
    if kind == "slim-llm":
        assert recipe.method.options["range"] == "sqc"
    elif recipe.method.name == "omniquant":
        assert (recipe.method.options["steps"], recipe.method.options["rate"]) == (200, 0.1)
        assert recipe.method.options["both"] and recipe.method.options["decay"] and not recipe.spec.symmetric
    elif method == "signround":
        assert recipe.method.options["steps"] == {"light": 50, "": 200, "best": 1000}[variant]
        assert recipe.spec.symmetric
    elif kind == "slim-tuned":
        pass  # as bitfloor, see above
    elif method == "bitfloor":
        assert (recipe.method.options["steps"] == 0) == (variant == "fast") and not recipe.spec.symmetric
        assert (recipe.tune is not None) == (variant == "tuned")
    else:
        assert recipe.method.options["range"] == (variant or "search")
    assert recipe.name == name and recipe.embedding.bits == 8
    assert recipe.description and "\n" not in recipe.description


def test_the_preset_with_a_size_in_its_name_has_it_in_its_budget() -> None:
    recipe, plain = load_recipe("bitfloor-1.61"), load_recipe("bitfloor-w2g64")
    assert recipe.allocation is not None
    assert (recipe.allocation.policy, recipe.allocation.stored, recipe.allocation.widths) == (
        "budget",
        1.61,
        (1, 2, 3, 4),
    )
    assert recipe.spec == plain.spec.model_copy(update={"group_size": 192}) and recipe.spec.centred == 2
    assert recipe.method.options == {**plain.method.options, "steps": 200} and recipe.tune is None


def test_the_preset_without_a_width_in_its_name_is_the_published_recipe() -> None:
    recipe = load_recipe("ptq161")
    assert (recipe.method.name, recipe.spec.bits, recipe.spec.group_size, recipe.embedding.bits) == ("ptq161", 1, -1, 8)
    assert not recipe.spec.symmetric and recipe.spec.rotation == 0 and recipe.allocation is None and recipe.tune is None
    wanted = {
        "ratio": 0.2,
        "salient_bits": 4,
        "score": "max",
        "range": "row",
        "rate": 5e-4,
        "both": True,
        "cosine": True,
    }
    assert {key: getattr(Ptq161Config(**recipe.method.options), key) for key in wanted} == wanted
    assert recipe.method.options["steps"] == 5 * recipe.calibration.sequences == 640


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_is_short_commented_and_plain_yaml(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 12 and text.startswith("# ")
    assert yaml.safe_load(text) == parse_yaml(text, path.name)


def test_listing_and_showing_need_neither_schema_nor_methods() -> None:
    program = (
        "import sys; from bitfloor.recipe import catalog\n"
        "catalog.presets(); catalog.preset_text('gptq-w4g64')\n"
        "print([m for m in ('pydantic', 'torch', 'transformers', 'bitfloor.methods') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert {preset.name for preset in presets()} == set(preset_names())


def test_the_dump_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w3g64", ["layers=[{match: '*.down_proj', bits: 4}]", "method.damping=1e-3", "seed=7"])
    file = tmp_path / "mine.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe
    assert load_recipe(yaml.safe_load(file.read_text())).sha256() == recipe.sha256()


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(preset_text("rtn-w2g64"))
    assert load_recipe(str(file)).name == "mine"


def test_overrides_reach_every_depth_in_order() -> None:
    recipe = load_recipe(
        "gptq-w4g64",
        [
            "bits=3",
            "group_size=-1",
            "spec.bits=2",
            "layers=[{match: 'a', bits: 8}]",
            "layers.0.bits=6",
            "head.bits=null",
            "method.act_order=false",
            "calibration.text=notes.jsonl:body",
        ],
    )
    assert (recipe.spec.bits, recipe.spec.group_size) == (2, -1)
    assert recipe.layers[0].bits == 6 and recipe.head.bits is None
    assert recipe.method.options["act_order"] is False
    assert recipe.calibration.text == "notes.jsonl:body"


def test_the_name_says_what_was_changed() -> None:
    assert load_recipe("gptq-w4g64", ["bits=2"], calibration="a.txt").name == "gptq-w4g64 bits=2 calibration.text=a.txt"
    assert load_recipe("gptq-w4g64", ["bits=2", "name=small"]).name == "small"


def test_the_calibration_argument_wins_over_an_override() -> None:
    assert load_recipe("rtn-w4g64", ["calibration.text=a.txt"], calibration="b.txt").calibration.text == "b.txt"


def test_a_mapping_is_not_changed_by_its_overrides() -> None:
    data = {"method": {"name": "rtn"}, "spec": {"bits": 4, "group_size": 64}}
    assert load_recipe(data, ["bits=2"]).spec.bits == 2
    assert data == {"method": {"name": "rtn"}, "spec": {"bits": 4, "group_size": 64}}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("bits", "not of the form path.to.key=value"),
        ("=3", "not of the form"),
        ("spec..bits=3", "not of the form"),
        ("spec.bits=[", "is not valid YAML"),
        ("spec.bits.x=3", "bits is a single value (4)"),
        ("bitz=3", "did you mean spec.bits?"),
        ("spec.bitz=3", "did you mean spec.bits?"),
        ("spec.bits=", "spec.bits = null"),
        ("layers.0.bits=3", "layers = "),
        ("method.name=gptqq", "did you mean gptq? known methods: bitfloor, gptq, omniquant, ptq161, rtn, signround"),
        ("method.dampin=1", "did you mean method.damping?"),
        ("method.damping=much", 'method.damping = "much" is not allowed; use a number'),
        ("method.act_order=1", "method.act_order = 1 is not allowed; use true or false"),
        ("method.range=mse", "use search or minmax"),
    ],
)
def test_a_bad_override_is_explained(override: str, part: str) -> None:
    assert part in refusal("gptq-w4g64", [override])


def test_a_list_index_must_exist() -> None:
    data: dict[str, Any] = {"layers": [{"match": "a"}]}
    apply_override(data, "layers.0.bits=3")
    assert data == {"layers": [{"match": "a", "bits": 3}]}
    with pytest.raises(InputError, match="'1' is no entry of a list of 1"):
        apply_override(data, "layers.1.bits=3")


def test_defaults_of_the_method_are_part_of_the_hash() -> None:
    plain, spelt, other = (load_recipe("gptq-w4g64", o) for o in ([], ["method.damping=0.01"], ["method.damping=0.02"]))
    assert plain.method.options == {
        "range": "search",
        "importance": 1.0,
        "static_groups": True,
        "damping": 0.01,
        "act_order": True,
        "correction": 0.0,
        "sweeps": 0,
    }
    assert plain.sha256() == spelt.sha256() != other.sha256()


def test_a_whole_number_is_a_fine_float_and_hashes_like_one() -> None:
    assert (
        load_recipe("gptq-w4g64", ["method.damping=1"]).sha256()
        == load_recipe("gptq-w4g64", ["method.damping=1.0"]).sha256()
    )


def test_unknown_recipes_name_the_closest_and_all() -> None:
    message = refusal("gptq-w4g46")
    assert "did you mean gptq-w4g64?" in message and all(name in message for name in preset_names())


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "nothing.yaml cannot be read" in refusal(str(tmp_path / "nothing.yaml"))
    assert "Is a directory" in refusal(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "a recipe is a mapping" in refusal(tmp_path / "list.yaml", ["bits=3"])
    (tmp_path / "broken.yaml").write_text("spec: {bits: 3\nmethod: x")
    assert "line 2" in refusal(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert "not NoneType" in refusal(tmp_path / "empty.yaml")


def test_yaml_traps() -> None:
    assert parse_yaml("a: 1e-3\nb: -2E5\nc: 1.5", "x") == {"a": 1e-3, "b": -2e5, "c": 1.5}
    with pytest.raises(InputError, match="line 2: key 'bits' is given twice"):
        parse_yaml("bits: 3\nbits: 4", "x")

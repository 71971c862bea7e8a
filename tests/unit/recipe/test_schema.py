"""Recipes say what they mean, and refuse the rest in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from bitfloor.core.errors import InputError
from bitfloor.core.spec import BITS, QuantSpec
from bitfloor.recipe.schema import Recipe, parse_recipe


def data(**changes: Any) -> dict[str, Any]:
    return {"method": {"name": "gptq"}, "spec": {"bits": 4, "group_size": 64}, **changes}


def refusal(content: Any) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(content, "recipe r")
    message = str(caught.value)
    assert message.startswith("recipe r: ")
    assert "\n" not in message and "pydantic" not in message
    return message


def test_the_smallest_recipe_has_the_documented_defaults() -> None:
    recipe = parse_recipe(data(), "r")
    assert recipe.seed == 0 and recipe.layers == ()
    assert (recipe.spec.symmetric, recipe.spec.scale_dtype) == (False, "float16")
    assert (recipe.embedding.bits, recipe.embedding.group_size) == (8, 64)
    assert recipe.head.bits is None and recipe.head_bits == 8
    assert recipe.calibration.model_dump() == {
        "text": "default",
        "sequences": 128,
        "seqlen": 512,
        "batch_size": 8,
        "mode": "auto",
        "min_chars": 1500,
        "precision": "auto",
    }


@pytest.mark.parametrize("bits", BITS)
def test_every_stored_width_is_accepted(bits: int) -> None:
    assert parse_recipe(data(spec={"bits": bits, "group_size": -1}), "r").spec.bits == bits


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"spec": {"bits": 7, "group_size": 64}}, ("spec.bits = 7", "1, 2, 3, 4, 5, 6, 8")),
        ({"spec": {"bits": True, "group_size": 64}}, ("spec.bits = true", "1, 2, 3")),
        ({"spec": {"bits": "4", "group_size": 64}}, ('spec.bits = "4"',)),
        ({"spec": {"bits": 4, "group_size": 0}}, ("spec.group_size = 0", "-1 for whole rows")),
        ({"spec": {"bits": 4, "group_size": -2}}, ("spec.group_size = -2",)),
        ({"spec": {"bits": 4}}, ("spec.group_size is missing",)),
        ({"spec": {"bits": 4, "group_size": 64, "scale_dtype": "float32"}}, ("scale_dtype", "float16 or bfloat16")),
        ({"seed": -1}, ("seed = -1", "0 or more")),
        ({"seed": 2**63}, ("seed = 9223372036854775808", "below 2^63")),
        ({"seed": 1.5}, ("seed = 1.5",)),
        ({"method": "gptq"}, ('method = "gptq"', "{name: gptq}")),
        ({"embedding": {"bits": 7}}, ("embedding.bits = 7", "or 8, 6, 5, 4, 3, 2")),
        ({"embedding": {"bits": None}}, ("embedding.bits = null",)),
        ({"head": {"bits": 1}}, ("head.bits = 1", "null")),
        ({"calibration": {"sequences": 0}}, ("calibration.sequences = 0", "positive")),
        ({"calibration": {"seqlen": 1}}, ("calibration.seqlen = 1",)),
        ({"calibration": {"mode": "both"}}, ('calibration.mode = "both"', "documents, packed or auto")),
        ({"calibration": {"text": ""}}, ('calibration.text = ""', ".jsonl[:field]")),
        ({"layers": {"match": "*"}}, ("layers = ", "a list of rules")),
        ({"layers": [{"bits": 3}]}, ("layers[0].match is missing",)),
        ({"layers": [{"match": "*", "bits": 4}, {"match": "*", "bits": 9}]}, ("layers[1].bits = 9",)),
        ({"layers": [{"match": "*"}]}, ("layers[0] changes nothing", "rotation")),
        ({"layers": [{"match": "*", "rotation": 48}]}, ("layers[0].rotation = 48", "power of two")),
        ({"spec": {"bits": 2, "group_size": 64, "rotation": True}}, ("spec.rotation = true", "power of two")),
        ({"layers": [{"match": "*", "keep": True, "bits": 3}]}, ("layers[0] keeps", "bits")),
        ({"layers": [{"match": "*", "bits": 3, "reason": "x"}]}, ("layers[0] gives a reason",)),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = refusal(data(**changes))
    for part in parts:
        assert part in message


def test_a_rotation_is_in_the_hash_only_where_it_is_used() -> None:
    plain = parse_recipe(data(), "x")
    zero = parse_recipe(data(spec={**data()["spec"], "rotation": 0}), "x")
    turned = parse_recipe(data(spec={**data()["spec"], "rotation": 64}), "x")
    rule = parse_recipe(data(layers=[{"match": "*.down_proj", "rotation": 64}]), "x")
    assert plain.sha256() == zero.sha256() and "rotation" not in plain.content()["spec"]
    assert len({plain.sha256(), turned.sha256(), rule.sha256()}) == 3
    spec = {**data()["spec"], "rotation": 64}
    for said in ({"bits": 4}, {"bits": 4, "rotation": 0}, {"rotation": 0}):
        mixed = parse_recipe(data(spec=spec, layers=[{"match": "*.down_proj", **said}]), "x")
        assert mixed.decide("a.down_proj").spec.rotation == (64 if "rotation" not in said else 0)
        again = parse_recipe(mixed.content(), "x")
        assert again.sha256() == mixed.sha256() and again.decide("a.down_proj") == mixed.decide("a.down_proj")
    kinds = [
        parse_recipe(data(spec=spec, layers=[{"match": "*.down_proj", "bits": 4, **more}]), "x")
        for more in ({}, {"rotation": 0})
    ]
    assert kinds[0].sha256() != kinds[1].sha256()
    assert rule.decide("a.down_proj").spec.rotation == 64 and rule.decide("a.up_proj").spec.rotation == 0


@pytest.mark.parametrize(
    ("changes", "meant"),
    [
        ({"sepc": {}}, "spec"),
        ({"bits": 3}, "spec.bits"),
        ({"calibration": {"sequence": 3}}, "calibration.sequences"),
        ({"layers": [{"match": "*", "bit": 3}]}, "layers[0].bits"),
        ({"embedding": {"group": 3}}, "embedding.group_size"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(changes: dict[str, Any], meant: str) -> None:
    assert f"did you mean {meant}?" in refusal(data(**changes))


def test_unknown_keys_come_before_what_is_missing_because_of_them() -> None:
    assert "unknown key metod; did you mean method?" in refusal({"metod": {"name": "rtn"}, "spec": data()["spec"]})


def test_something_that_is_no_mapping_is_refused() -> None:
    assert "not list" in refusal(["gptq"])


def test_later_rules_win_also_over_keep() -> None:
    rules = [
        {"match": "*.down_proj", "bits": 6},
        {"match": "model.layers.0.*", "keep": True, "reason": "the first block is fragile"},
        {"match": "model.layers.0.self_attn.*", "group_size": 32, "symmetric": True},
    ]
    recipe = parse_recipe(data(layers=rules), "r")
    assert recipe.decide("model.layers.3.mlp.down_proj") == (QuantSpec(6, 64), "")
    assert recipe.decide("model.layers.0.mlp.down_proj") == (None, "the first block is fragile")
    assert recipe.decide("model.layers.0.self_attn.q_proj") == (QuantSpec(4, 32, symmetric=True), "")
    assert recipe.decide("model.layers.3.mlp.up_proj") == (QuantSpec(4, 64), "")


def test_a_rule_without_a_reason_still_gives_one() -> None:
    recipe = parse_recipe(data(layers=[{"match": "a*", "keep": True}]), "r")
    assert recipe.decide("ab").reason == "the recipe keeps a*"


def test_a_rule_that_matches_nothing_is_refused_with_the_closest_name() -> None:
    recipe = parse_recipe(data(layers=[{"match": "*.q_proj", "bits": 3}, {"match": "*.down_prj", "bits": 3}]), "r")
    with pytest.raises(InputError, match=r"layers\[1\].match = '\*.down_prj' matches none .*layers.0.down_proj"):
        recipe.check_rules(["model.layers.0.q_proj", "model.layers.0.down_proj"])


def test_the_hash_covers_what_and_only_what() -> None:
    base = parse_recipe(data(), "r").sha256()
    assert parse_recipe(data(name="other", description="words"), "r").sha256() == base
    assert parse_recipe(data(embedding={"bits": 8}, seed=0), "r").sha256() == base
    changed: list[dict[str, Any]] = [
        {"seed": 1},
        {"spec": {"bits": 4, "group_size": 64, "symmetric": True}},
        {"method": {"name": "gptq", "damping": 0.02}},
        {"layers": [{"match": "*", "bits": 4}]},
        {"head": {"bits": 8}},
        {"calibration": {"seqlen": 256}},
    ]
    hashes = {parse_recipe(data(**change), "r").sha256() for change in changed}
    assert len(hashes) == len(changed) and base not in hashes


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(data(), "r")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)

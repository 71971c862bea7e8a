"""The table of methods, their options, and the stages they work through."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
from unit.methods.toy_block import ToyBlock, batches

from bitfloor.methods.base import BlockResult, Need, stages
from bitfloor.methods.options import OPTIONS
from bitfloor.methods.table import METHODS


def test_every_method_has_options_under_its_own_name_and_the_other_way_round() -> None:
    assert set(METHODS) == set(OPTIONS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.Config is OPTIONS[name]
        assert method.paper
        assert method.summary


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_are_few_frozen_and_start_at_an_allowed_choice(name: str) -> None:
    config = OPTIONS[name]()
    assert len(fields(config)) <= 12
    with pytest.raises(FrozenInstanceError):
        config.range = "other"
    for option, allowed in getattr(config, "CHOICES", {}).items():
        assert getattr(config, option) in allowed


@pytest.mark.parametrize("name", sorted(METHODS))
def test_needs_are_needs(name: str) -> None:
    assert all(isinstance(need, Need) for need in METHODS[name](OPTIONS[name]()).needs)


def test_stages_keep_execution_order_and_merge_the_experts() -> None:
    block = ToyBlock(routes=[0, 1, 2] * 10, experts=3)
    found = stages(block, batches(1), block.weights)
    assert found == [
        [("a", "b")],
        [("c",)],
        [("up.0",), ("up.1",), ("up.2",)],
        [("down.0",), ("down.1",), ("down.2",)],
    ]


def test_stages_hold_only_what_is_wanted() -> None:
    block = ToyBlock(routes=[0, 1] * 15, experts=2)
    assert stages(block, batches(1), ["b", "down.1"]) == [[("b",)], [("down.1",)]]
    assert stages(block, batches(1), []) == []


def test_results_do_not_share_their_dictionaries() -> None:
    one, other = BlockResult(), BlockResult()
    assert one.weights is not other.weights
    assert one.reports is not other.reports

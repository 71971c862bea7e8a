"""Capture: arguments as the model passes them, stored once, and a refusal for models that cannot be replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model, token_batches
from torch import Tensor, nn

from bitfloor.calib.capture import Call, capture, run_tail
from bitfloor.calib.streams import Stream
from bitfloor.core.errors import InputError


def test_hidden_states_and_calls_of_every_block_and_batch() -> None:
    model = pico_model("llama")
    batches = [*token_batches(2), *token_batches(1, tokens=9)]
    runs = capture(model, "model.layers", batches)
    assert [h.shape for h in runs.hidden] == [(2, 12, 48), (2, 12, 48), (2, 9, 48)]
    assert len(runs.calls) == 3 and all(len(calls) == 3 for calls in runs.calls)
    assert torch.equal(runs.hidden[1], model.model.embed_tokens(batches[1]))
    args, kwargs = runs.calls[2][0].bind(runs.hidden[0])
    assert args[0] is runs.hidden[0] and kwargs["use_cache"] is False and kwargs["past_key_values"] is None


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def test_equal_arguments_are_stored_once() -> None:
    # Gemma 2 has two kinds of masks; one table each for cos and sin, one of positions. Not once per block and batch.
    runs = capture(pico_model("gemma2"), "model.layers", token_batches(4))
    pointers = {t.data_ptr() for calls in runs.calls for c in calls for t in tensors_in((c.args, c.kwargs))}
    assert len(pointers) == 2 + 2 + 1


def test_masks_are_those_of_each_block() -> None:
    runs = capture(pico_model("gemma2"), "model.layers", token_batches(1))
    masks = [calls[0].kwargs["attention_mask"] for calls in runs.calls]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


def test_the_model_is_left_as_it_was() -> None:
    model = pico_model("llama")
    blocks, state = list(model.model.layers), torch.get_rng_state()
    capture(model, "model.layers", token_batches(1))
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_the_model_is_left_as_it_was_after_a_failure() -> None:
    model = pico_model("llama")
    blocks = list(model.model.layers)
    with pytest.raises(Exception):  # noqa: B017 - whatever the embedding raises on an unknown token
        capture(model, "model.layers", [torch.full((1, 4), 10**6)])
    assert all(a is b for a, b in zip(model.model.layers, blocks, strict=True))


def test_no_batches_no_calls() -> None:
    runs = capture(pico_model("llama"), "model.layers", [])
    assert len(runs.hidden) == 0 and runs.calls == []


def test_hidden_states_go_straight_to_files(tmp_path: Path) -> None:
    batches = token_batches(2)
    spilled = Stream(folder=tmp_path)
    runs = capture(pico_model("llama"), "model.layers", batches, spilled)
    assert runs.hidden is spilled and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(spilled[1], capture(pico_model("llama"), "model.layers", batches).hidden[1])


def test_block_weights_are_not_needed() -> None:
    model = pico_model("llama")
    model.model.layers.to("meta")
    assert capture(model, "model.layers", token_batches(1)).hidden[0].shape == (2, 12, 48)


def test_tail_is_norm_and_head() -> None:
    model, batch = pico_model("llama"), token_batches(1)[0]
    hidden = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run_tail(model, "model.layers", batch, hidden), model.lm_head(model.model.norm(hidden)))


def test_bind_puts_the_hidden_state_where_it_was() -> None:
    x = torch.ones(1, 2, 3)
    assert Call((None, 5), {"a": 1}, 0).bind(x) == ((x, 5), {"a": 1})
    assert Call((), {"hidden_states": None, "a": 1}, "hidden_states").bind(x) == ((), {"hidden_states": x, "a": 1})


# -- models of our own, each with one habit ---------------------------------------------------------------------------


class Toy(nn.Module):
    """Embedding, two blocks, norm; ``step`` is how the model goes from block to block."""

    def __init__(self, step: Callable[[Toy, nn.Module, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.step = step
        self.memory: dict[int, Tensor] = {}

    def forward(self, input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
        hidden = self.embed(input_ids)
        for k, block in enumerate(self.blocks):
            hidden = self.step(self, block, hidden, k)
        return (self.norm(hidden),)


def plain(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block(hidden)


def by_keyword(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block(hidden_states=hidden)


def first_of_tuple(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block(hidden)[0]


def with_first_input(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    model.memory.setdefault(0, hidden) if k == 0 else None
    return block(hidden, skip=model.memory[0])


def scaled_between(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return 2 * block(hidden)


def from_the_block_before(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block(hidden, gate=hidden.mean())


def through_a_dict(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block(hidden, shared=model.memory)


def twice(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block(block(hidden))


def skipping(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block(hidden) if k == 0 else hidden


def without_hidden(model: Toy, block: nn.Module, hidden: Tensor, k: int) -> Tensor:
    return block("nothing")


@pytest.mark.parametrize("step", [plain, by_keyword, first_of_tuple])
def test_ways_of_calling_a_block(step: Any) -> None:
    runs = capture(Toy(step), "blocks", [torch.arange(6).reshape(2, 3)])
    assert runs.hidden[0].shape == (2, 3, 4)
    assert runs.calls[1][0].slot == ("hidden_states" if step is by_keyword else 0)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (scaled_between, "between its blocks"),
        (from_the_block_before, "arguments of block 1 of Toy depend on earlier blocks"),
        (through_a_dict, "shared of type dict"),
        (twice, "out of order"),
        (skipping, "block"),
        (without_hidden, "without a hidden state"),
    ],
)
def test_models_that_cannot_be_replayed_are_refused(step: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        capture(Toy(step), "blocks", [torch.arange(6).reshape(2, 3)])


def test_an_argument_made_before_the_blocks_is_fine() -> None:
    class Fresh(Toy):
        def forward(self, input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
            self.memory.clear()
            return super().forward(input_ids, use_cache)

    runs = capture(Fresh(with_first_input), "blocks", [torch.arange(6).reshape(2, 3)])
    assert torch.equal(runs.calls[1][0].kwargs["skip"], runs.hidden[0])

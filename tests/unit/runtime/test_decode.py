"""A decoder gives, token by token, what the model's forward gives for the whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import VOCAB, pico_model

from bitfloor.core.errors import InputError
from bitfloor.runtime.decode import MovingAngles, TransformersDecoder, open_decoder

# One of each kind of cache and of position: rotary, sliding window on all or on some layers, learned positions, ALiBi.
KINDS = ["llama", "mistral", "gemma3_text", "opt", "gpt2", "falcon_alibi", "gpt_oss"]
IDS = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def whole(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # Float32 sums in another order: about 1e-6 of logits around 1 to 10, some layers deep.
    return found.dtype == torch.float32 and found.shape == (VOCAB,) and torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_pieces_and_steps_give_the_logits_of_the_whole(name: str) -> None:
    model = pico_model(name)
    decoder = open_decoder(model)
    assert close(decoder.prefill(IDS[:3]), whole(model, IDS[:3]))
    assert close(decoder.prefill(IDS[3:20]), whole(model, IDS[:20]))
    for count in range(21, 24):
        assert close(decoder.step(IDS[count - 1]), whole(model, IDS[:count]))
    assert decoder.length == 23


@pytest.mark.parametrize("name", KINDS)
def test_after_truncate_it_continues_from_the_prefix(name: str) -> None:
    model = pico_model(name)
    decoder = open_decoder(model)
    decoder.prefill(IDS[:5])
    decoder.truncate(3)  # shorter than any window
    assert close(decoder.step(IDS[9]), whole(model, [*IDS[:3], IDS[9]]))
    decoder.prefill(IDS[:20])
    decoder.truncate(12)  # longer than the sliding windows of 6
    assert decoder.length == 12
    assert close(decoder.prefill(IDS[30:34]), whole(model, [*IDS[:3], IDS[9], *IDS[:8], *IDS[30:34]]))
    decoder.truncate(0)
    assert close(decoder.prefill(IDS[:2]), whole(model, IDS[:2]))


def test_positions_that_depend_on_the_length_are_computed_again_where_they_change() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    model = pico_model("phi3", max_position_embeddings=200, original_max_position_embeddings=24, rope_parameters=rope)
    decoder = open_decoder(model)
    decoder.prefill(IDS[:20])
    assert close(decoder.prefill(IDS[20:30]), whole(model, IDS[:30]))  # a prompt in pieces, over the border
    for count in range(31, 34):
        assert close(decoder.step(IDS[count - 1]), whole(model, IDS[:count]))
    decoder.truncate(22)
    assert close(decoder.step(IDS[22]), whole(model, IDS[:23]))  # back to the short ones
    for count in range(24, 28):
        assert close(decoder.step(IDS[count - 1]), whole(model, IDS[:count]))  # token by token over the border
    decoder.truncate(26)
    assert close(decoder.step(IDS[26]), whole(model, IDS[:27]))


def test_dynamic_positions_of_a_prompt_are_those_of_the_whole_prompt() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = pico_model("llama", max_position_embeddings=24, rope_parameters=rope)
    model.config.max_position_embeddings = 200  # of what it may hold; the angles know their own
    angles = MovingAngles("dynamic", 24)
    assert angles.change(20, 30) and angles.change(28, 34) and not angles.change(28, 29)
    assert not angles.change(10, 20) and angles.change_back(26, 30) and not angles.change_back(10, 20)
    assert MovingAngles.of(model).kind == "dynamic" and MovingAngles.of(pico_model("llama")).kind is None


def test_a_prefix_is_not_computed_again() -> None:
    model = pico_model("llama")
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    decoder = TransformersDecoder(model)
    decoder.prefill(IDS[:20])
    decoder.truncate(15)
    decoder.prefill(IDS[:3])
    assert seen == [20, 3]


def test_an_interrupted_step_does_no_harm() -> None:
    model = pico_model("llama")
    decoder = TransformersDecoder(model)
    decoder.prefill(IDS[:8])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)  # layer 0 has appended to its cache by then
    with pytest.raises(KeyboardInterrupt):
        decoder.step(IDS[8])
    hook.remove()
    assert decoder.length == 8
    assert close(decoder.step(IDS[8]), whole(model, IDS[:9]))


def test_a_model_without_a_cache_of_the_usual_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico_model("llama")
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", classmethod(lambda _: False))
    decoder = TransformersDecoder(model)
    decoder.prefill(IDS[:4])
    assert close(decoder.step(IDS[4]), whole(model, IDS[:5]))
    decoder.truncate(2)
    assert close(decoder.step(IDS[7]), whole(model, [*IDS[:2], IDS[7]]))


def test_bounds() -> None:
    model = pico_model("llama")
    assert open_decoder(model).context == 128
    assert open_decoder(model, 200).context == 128
    assert open_decoder(model, 10).context == 10
    decoder = TransformersDecoder(model, 10)
    assert decoder.context == 10
    decoder.prefill(IDS[:10])
    with pytest.raises(InputError, match="10 tokens and 1 more do not fit in a context of 10"):
        decoder.step(3)
    with pytest.raises(InputError, match="cannot be cut to 11"):
        decoder.truncate(11)
    with pytest.raises(InputError, match="no tokens"):
        decoder.prefill([])
    model.config.max_position_embeddings = 0  # says nothing
    assert open_decoder(model).context is None

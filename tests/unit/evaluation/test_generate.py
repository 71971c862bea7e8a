import pytest
import torch
from transformers import GenerationConfig

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.evaluation.generate import generate_text


def greedy(model, ids: list[int], count: int) -> list[int]:
    """Argmax by full forward passes, without a cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def never_ends(model):
    """A head that cannot name the end token, so that lengths are predictable."""
    model.generation_config = GenerationConfig(eos_token_id=None)
    return model


def test_greedy_equals_repeated_argmax(llama, words) -> None:
    model = never_ends(llama(3))
    words.eos_token = None
    made = generate_text(model, words, "w1 w2 w3", max_new_tokens=6)
    expected = greedy(model, [4, 5, 6], 6)[3:]
    assert made.text == " " + words.decode(expected, skip_special_tokens=True)  # as it follows the prompt
    assert (made.prompt_tokens, made.new_tokens, made.stopped) == (3, 6, "length")


def test_the_model_s_sampling_settings_are_not_used(llama, words) -> None:
    model = llama(3)
    plain = generate_text(model, words, "w1 w2", max_new_tokens=8)
    model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, eos_token_id=1)
    own = model.generation_config
    assert generate_text(model, words, "w1 w2", max_new_tokens=8) == plain
    assert model.generation_config is own


def test_end_token_stops(llama, words) -> None:
    model = llama(3)
    made = greedy(model, [4, 5], 4)[2:]
    first = made[0]
    model.generation_config = GenerationConfig(eos_token_id=[1, first])  # a chat model has several
    result = generate_text(model, words, "w1 w2", max_new_tokens=8)
    assert (result.new_tokens, result.stopped) == (1, "end")


def test_context_bounds_the_text(llama, words) -> None:
    model = never_ends(llama(3))
    words.eos_token = None
    result = generate_text(model, words, " ".join(["w1"] * 30), max_new_tokens=8)
    assert (result.prompt_tokens, result.new_tokens, result.stopped) == (30, 2, "context")
    with pytest.raises(InputError, match="prompt has 32 tokens and the model's context holds 32"):
        generate_text(model, words, " ".join(["w1"] * 32))


def test_empty_prompt_begins_from_the_start_token(llama, words) -> None:
    model = llama(3)
    assert generate_text(model, words, "", max_new_tokens=3).prompt_tokens == 1
    words.bos_token = None
    assert generate_text(model, words, "", max_new_tokens=3).prompt_tokens == 1
    words.eos_token = None
    model.config.bos_token_id = None
    with pytest.raises(InputError, match="prompt is empty"):
        generate_text(model, words, "")


def test_sampling_repeats_with_its_seed_and_leaves_the_global_state(llama, words) -> None:
    model = never_ends(llama(3))
    words.eos_token = None
    torch.manual_seed(123)
    before = torch.get_rng_state()
    texts = [generate_text(model, words, "w1", max_new_tokens=16, temperature=1.5, seed=s).text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_chat_template_only_when_asked(llama, words) -> None:
    with pytest.raises(InputError, match="no chat template"):
        generate_text(llama(3), words, "w1", chat=True)
    words.chat_template = "{% for m in messages %}w9 {{ m['content'] }} w9{% endfor %}"
    assert generate_text(llama(3), words, "w1", max_new_tokens=1, chat=True).prompt_tokens == 3
    assert generate_text(llama(3), words, "w1", max_new_tokens=1).prompt_tokens == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
    ],
)
def test_numbers_out_of_range(llama, words, options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_text(llama(3), words, "w1", **options)


def test_damaged_model_fails_the_run(llama, words) -> None:
    model = llama(3)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(BitfloorError, match="NaN"):
            generate_text(model, words, "w1", max_new_tokens=2, temperature=temperature)

"""Adapters of peft: put where they were asked to, learning, merged, or refused with a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef
from bitfloor.modeling.adapters import AdapterChoice, Adapters, check_adapter


class Two(nn.Module):
    """Two linears and a Conv1D, ``a`` followed by a name that ends alike."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.ba, self.c = nn.Linear(6, 5), nn.Linear(5, 4), Conv1D(3, 4)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.c(torch.tanh(self.ba(torch.tanh(self.a(x)))))
        return found


REFS = {
    "a": MatrixRef("a", "a.weight", (5, 6), 0, "linear"),
    "ba": MatrixRef("ba", "ba.weight", (4, 5), 0, "linear"),
    "c": MatrixRef("c", "c.weight", (3, 4), 0, "conv1d", transposed=True),
}


@pytest.mark.parametrize("names", [["a"], ["a", "ba"], ["c"], ["ba", "c"]])
def test_what_learns_is_merged_and_the_rest_stays(names: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(7, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = model(x)
    adapters = Adapters(model, [REFS[name] for name in names], AdapterChoice(rank=2, alpha=6.0, dropout=0.0), 0)
    assert torch.equal(model(x), start)  # nothing is changed by the start
    assert {name.split(".")[0] for name in adapters.parameters} == set(names)
    with torch.no_grad():
        for parameter in adapters.parameters.values():
            parameter.normal_()
    learnt = {name: value.detach().clone() for name, value in adapters.parameters.items()}
    adapted = model(x)
    adapters.merge()
    assert torch.allclose(model(x), adapted, atol=1e-5) and not torch.allclose(adapted, start, atol=1e-3)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        matrix = name.removesuffix(".weight")
        if matrix in names:
            delta = 3.0 * learnt[f"{matrix}.lora_B.default.weight"] @ learnt[f"{matrix}.lora_A.default.weight"]
            assert torch.allclose(after[name], value + (delta.t() if matrix == "c" else delta), atol=1e-5)
        else:
            assert torch.equal(after[name], value)


def test_the_start_depends_on_the_seed_alone() -> None:
    found = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(noise)
        adapters = Adapters(Two(), [REFS["a"]], AdapterChoice(rank=2), seed)
        found.append(adapters.parameters["a.lora_A.default.weight"].detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_dropout_is_of_the_adapters_alone() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    adapters = Adapters(model, [REFS["a"]], AdapterChoice(rank=2, dropout=0.5), 0)
    with torch.no_grad():
        adapters.parameters["a.lora_B.default.weight"].normal_()
    x = torch.randn(7, 6)
    adapters.train(True)
    assert not model.training and not torch.equal(model(x), model(x))
    adapters.train(False)
    assert torch.equal(model(x), model(x))


def test_parameters_are_counted_for_all_matrices() -> None:
    refs = [REFS["a"], MatrixRef("x", "x.weight", (5, 6), 1, "linear"), REFS["ba"]]
    state = torch.get_rng_state()
    assert check_adapter(AdapterChoice(rank=3), refs) == 3 * (2 * (5 + 6) + 4 + 5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (AdapterChoice("lora", rank=0), "peft"),
        (AdapterChoice("beft", None, None, None), "changes biases too"),
        (AdapterChoice("poly", None, None, None), "cannot be merged"),
        (AdapterChoice("adalora", None, None, None, {"total_step": 10}), "learns on a schedule of its own"),
        (AdapterChoice(options={"init_lora_weights": False}), "changes the model before it has learnt anything"),
        (AdapterChoice("fourierft", None, None, None, {"n_frequency": 9}), "before it has learnt anything"),
        (AdapterChoice("miss", None, None, None), "cannot put the adapter miss on this model"),
        (AdapterChoice("loha", 2, 4.0, 0.1, {"module_dropout": 0.2}), "are one setting"),
        (AdapterChoice(options={"bias": "all"}), "restore.options.bias is set by the stage itself"),
    ],
    ids=str,
)
def test_what_peft_or_merging_does_not_allow_is_a_sentence(choice: AdapterChoice, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_adapter(choice, [REFS["a"]])

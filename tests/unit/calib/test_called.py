"""Linear layers whose weight is read: found before they are packed, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pico import pico_model, token_batches
from torch import Tensor, nn

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.called import check_called
from bitfloor.calib.capture import Call, capture
from bitfloor.core.errors import BitfloorError
from bitfloor.core.spec import MatrixRef
from bitfloor.modeling.discover import describe

NAMES = ["m.0.called", "m.0.other", "m.0.idle"]
X = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    """Three linear layers, used as a test says."""

    def __init__(self, use: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.other, self.idle = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def runner_of(use: Callable[[Block, Tensor], Tensor]) -> BlockRunner:
    refs = [MatrixRef(name, f"{name}.weight", (4, 4), 0, "linear") for name in NAMES]
    return BlockRunner(Block(use), "m.0", refs, [Call((None,), {}, 0)])


READ: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "not called": lambda b, x: b.called(x) @ b.other.weight.t(),
    "called too": lambda b, x: b.called(x) + b.other(x) @ b.other.weight.t(),
    "transposed": lambda b, x: b.called(x) + b.other(x) @ b.other.weight,
    "for a choice": lambda b, x: b.called(x) * ((x @ b.other.weight.t()).sum() > -1e9),
}


@pytest.mark.parametrize("use", READ.values(), ids=READ.keys())
def test_a_weight_that_is_read_is_refused(use: Callable[[Block, Tensor], Tensor]) -> None:
    runner = runner_of(use)
    with pytest.raises(
        BitfloorError, match=r"a Block reads the weight of m\.0\.other .*match: '\*\.other', keep: true"
    ):
        check_called(runner, NAMES, X)
    check_called(runner, [NAMES[0], NAMES[2]], X)  # as a rule that keeps it has it


CALLED: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "one not used": lambda b, x: b.other(b.called(x)),
    "by its forward": lambda b, x: b.other.forward(b.called(x)),
    "twice": lambda b, x: b.other(b.other(x)),
    "asked for its type": lambda b, x: b.other(x.to(b.other.weight.dtype)),
    "with outputs that are none": lambda b, x: b.other(x) / torch.zeros_like(x),
}


@pytest.mark.parametrize("use", CALLED.values(), ids=CALLED.keys())
def test_what_is_called_passes_and_the_block_is_as_before(use: Callable[[Block, Tensor], Tensor]) -> None:
    runner = runner_of(use)
    weights = {name: value.clone() for name, value in runner.module.named_parameters()}
    own = runner.module.other.forward
    check_called(runner, NAMES, X)
    assert all(torch.equal(weights[name], value) for name, value in runner.module.named_parameters())
    assert runner.module.other.forward == own and "forward" not in vars(runner.module.other)


def test_a_weight_that_two_layers_have_is_let_be() -> None:
    runner = runner_of(lambda b, x: b.called(x))
    runner.module.idle.weight = runner.module.called.weight
    check_called(runner, NAMES, X)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral"])
def test_models_pass(name: str) -> None:
    model = pico_model(name).requires_grad_(False)
    parts = describe(model)
    runs = capture(model, parts.blocks_path, token_batches(1))
    runner = BlockRunner(
        model.get_submodule(parts.block_path(0)), parts.block_path(0), parts.block_matrices(0), runs.calls[0]
    )
    check_called(runner, runner.names, runs.hidden[0])

"""Fused experts: a stack answers like the parameter it replaces, one expert at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from packing import rtn
from torch import nn

from bitfloor.core.errors import BitfloorError
from bitfloor.core.packed import dequantize
from bitfloor.formats.native import encode, layout
from bitfloor.runtime.experts import PackedStack, install_stack
from bitfloor.runtime.linear import PackedMatrix


class _Experts(nn.Module):
    """The part of a fused experts module that matters here."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 20, 34) if transposed else torch.randn(3, 34, 20))

    def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.down_proj[expert])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_hands_out_one_dense_expert(transposed: bool) -> None:
    torch.manual_seed(0)
    experts = _Experts(transposed)
    matrices, dense = [], []
    for weight in experts.down_proj.detach():
        packed = rtn(weight.T if transposed else weight, 4, 16)
        matrices.append(PackedMatrix(layout(packed, "expert", transposed)))
        matrices[-1].load_parts({name.rpartition(".")[2]: t for name, t in encode("m", packed).items()})
        dense.append(dequantize(packed).T if transposed else dequantize(packed))
    install_stack(experts, "down_proj", matrices)
    stack = experts.down_proj
    assert isinstance(stack, PackedStack) and len(stack) == 3
    assert stack.shape == ((3, 20, 34) if transposed else (3, 34, 20))
    assert torch.equal(stack[1], dense[1]) and torch.equal(stack[torch.tensor(2)], dense[2])
    assert sorted(experts.state_dict())[0] == "0.down_proj.codes" and not list(experts.parameters())
    if not transposed:
        x = torch.randn(5, 20)
        assert torch.equal(experts(x, torch.tensor(1)), x @ dense[1].T)
    with pytest.raises(BitfloorError, match="set_experts_implementation"):
        stack[torch.tensor([0, 1])]
    copied = copy.deepcopy(experts).to(torch.bfloat16)
    assert copied.down_proj.dtype == copied.down_proj[0].dtype == torch.bfloat16 and stack.dtype == torch.float32
    assert copied.down_proj.device == torch.device("cpu")

"""Fused experts with packed weights, in an untouched experts module.

Transformers 5 keeps the experts of a layer in three-dimensional parameters, ``gate_up_proj [E, O, I]``. Here each
expert is a matrix of its own, stored as ``...experts.<index>.<param>.codes``. The parameter is replaced by an object
that hands out one dequantized expert at a time when indexed, which is all the eager implementation of most models does;
a model that multiplies by all experts at once gets the layer's stack dequantized whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitfloor.core.errors import BitfloorError
from bitfloor.runtime.linear import PackedMatrix


class PackedStack:
    """Stands in for a fused expert parameter ``[E, O, I]`` (or ``[E, I, O]``).

    Args:
        experts: the matrices by expert index; the module tree owns them.
    """

    _is_hf_initialized = True  # transformers' weight initialisation leaves it alone

    def __init__(self, experts: Sequence[PackedMatrix]) -> None:
        self.experts = tuple(experts)

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def shape(self) -> torch.Size:
        """``[E, O, I]`` as the model declares it."""
        return torch.Size((len(self.experts), *self.experts[0].weight.shape))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what indexing returns."""
        return self.experts[0].compute.dtype

    @property
    def device(self) -> torch.device:
        """Device of what indexing returns."""
        return self.experts[0].compute.device

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """One expert's weight, ``[O, I]`` or ``[I, O]`` as in the source, in the dtype of the activations.

        Raises:
            BitfloorError: more than one expert at once is asked for.
        """
        if isinstance(index, Tensor) and index.dim() == 0:
            index = int(index)
        if not isinstance(index, int):
            raise BitfloorError(
                "packed experts are read one at a time, and this implementation of the experts asked for many; "
                'call model.set_experts_implementation("eager").'
            )
        return self._one(self.experts[index])

    @staticmethod
    def _one(expert: PackedMatrix) -> Tensor:
        return expert.dense().T if expert.layout["transposed"] else expert.dense()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """A product over all experts at once, as Llama 4 has it: the layer's whole stack is dequantized."""
        del types

        def whole(value: Any) -> Any:
            return torch.stack([cls._one(e) for e in value.experts]) if isinstance(value, PackedStack) else value

        return func(*map(whole, args), **{key: whole(value) for key, value in (kwargs or {}).items()})


def install_stack(experts: nn.Module, param: str, matrices: Sequence[PackedMatrix]) -> None:
    """Replace the fused parameter ``param`` of an experts module by packed matrices.

    Args:
        experts: the module; its parameter is dropped, and children ``"<index>.<param>"`` appear in its state dict.
        param: name of the parameter.
        matrices: one per expert, in order.
    """
    del experts._parameters[param]
    for index, matrix in enumerate(matrices):
        if str(index) not in experts._modules:
            experts.add_module(str(index), nn.Module())
        experts.get_submodule(str(index)).add_module(param, matrix)
    setattr(experts, param, PackedStack(matrices))

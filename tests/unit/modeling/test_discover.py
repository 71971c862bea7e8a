"""Discovery: every parameter of an architecture is a named matrix or kept for a reason, or the model is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico import CONFIGS, pico_config
from torch import nn

from bitfloor.core.errors import InputError
from bitfloor.modeling.discover import ModelMap, describe, find_blocks
from bitfloor.modeling.skeleton import build_skeleton

# Matrices per block: attention, then feed-forward (4 experts x 2, and in two of them 3 of a shared expert).
PATHS = {
    "llama": ("model.layers", 7),
    "llama_tied": ("model.layers", 7),
    "mistral": ("model.layers", 7),
    "qwen2": ("model.layers", 7),
    "qwen3": ("model.layers", 7),
    "gemma2": ("model.layers", 7),
    "gemma3_text": ("model.layers", 7),
    "phi3": ("model.layers", 4),
    "opt": ("model.decoder.layers", 6),
    "gpt_neox": ("gpt_neox.layers", 4),
    "falcon": ("transformer.h", 4),
    "falcon_alibi": ("transformer.h", 4),
    "olmo2": ("model.layers", 7),
    "gpt2": ("transformer.h", 4),
    "mixtral": ("model.layers", 4 + 8),
    "qwen3_moe": ("model.layers", 4 + 8),
    "qwen2_moe": ("model.layers", 4 + 3 + 8),
    "gpt_oss": ("model.layers", 4 + 8),
    "llama4_text": ("model.layers", 4 + 3 + 8),
}


def skeleton(name: str, **changes: Any) -> Any:
    return build_skeleton(pico_config(name, **changes))


def shape_of(model: nn.Module, parts: ModelMap, name: str) -> tuple[int, int]:
    ref = next(r for r in parts.matrices if r.name == name)
    stored = model.get_parameter(ref.param)
    stored = stored if ref.index is None else stored[ref.index]
    rows, columns = (stored.t() if ref.transposed else stored).shape
    return rows, columns


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_parameter_is_named_once(name: str) -> None:
    model = skeleton(name)
    parts = describe(model)
    path, count = PATHS[name]
    assert (parts.blocks_path, parts.n_blocks, len(parts.matrices)) == (path, 3, 3 * count)
    assert len({ref.name for ref in parts.matrices}) == len(parts.matrices)
    held = {ref.param for ref in parts.matrices} | {parts.embedding.param, parts.head.param}  # type: ignore[union-attr]
    assert not held & set(parts.kept)
    assert held | set(parts.kept) == set(model.state_dict())
    assert all(parts.reasons[kept] for kept in parts.kept)
    for ref in parts.matrices:
        assert shape_of(model, parts, ref.name) == ref.shape
        assert ref.name.startswith(f"{path}.{ref.block}.")
    assert [ref.block for ref in parts.matrices] == sorted(ref.block for ref in parts.matrices)


def test_names_and_layouts_of_experts_and_conv1d() -> None:
    mixtral = {r.name: r for r in describe(skeleton("mixtral")).matrices}
    ref = mixtral["model.layers.0.mlp.experts.3.gate_up_proj"]
    assert (ref.param, ref.kind, ref.index, ref.transposed) == (
        "model.layers.0.mlp.experts.gate_up_proj",
        "expert",
        3,
        False,
    )
    assert ref.shape == (160, 48)
    stored_in_out = {r.name: r for r in describe(skeleton("gpt_oss")).matrices}
    ref = stored_in_out["model.layers.0.mlp.experts.3.gate_up_proj"]
    assert (ref.shape, ref.transposed) == ((160, 48), True)
    conv = {r.name: r for r in describe(skeleton("gpt2")).matrices}["transformer.h.1.attn.c_attn"]
    assert (conv.kind, conv.shape, conv.transposed) == ("conv1d", (144, 48), True)


def test_routers_are_kept_and_said_to_be() -> None:
    reasons = describe(skeleton("qwen2_moe")).reasons
    assert reasons["model.layers.1.mlp.gate.weight"] == "router"
    assert reasons["model.layers.1.mlp.shared_expert_gate.weight"] == "router"
    reasons = describe(skeleton("gpt_oss")).reasons
    assert reasons["model.layers.2.mlp.router.weight"] == "router"
    assert reasons["model.layers.2.mlp.experts.gate_up_proj_bias"] == "bias"
    assert reasons["model.layers.2.self_attn.sinks"] == "vector"


def test_a_dense_gate_is_no_router() -> None:
    assert any(r.name.endswith("mlp.gate_proj") for r in describe(skeleton("llama")).matrices)


def test_tied_and_untied_ends() -> None:
    untied, tied = describe(skeleton("llama")), describe(skeleton("llama_tied"))
    assert not untied.tied and untied.head is not None and untied.head.name == "lm_head"
    assert tied.tied and tied.head is not None and tied.embedding is not None
    assert tied.embedding.shape == tied.head.shape == (128, 48)
    assert "lm_head.weight" not in tied.kept


def test_maps_of_blocks() -> None:
    parts = describe(skeleton("llama"))
    assert parts.block_path(2) == "model.layers.2"
    assert {r.block for r in parts.block_matrices(1)} == {1} and len(parts.block_matrices(1)) == 7


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_linear_with_its_own_forward_is_refused() -> None:
    model = skeleton("llama")
    model.model.layers[1].mlp.up_proj = Doubled(48, 80, bias=False)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* belongs to Doubled"):
        describe(model)


def test_a_second_stack_is_refused() -> None:
    model = skeleton("llama")
    model.model.vision = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(InputError, match=r"second stack of blocks, model\.vision, beside model\.layers"):
        describe(model)


def test_a_small_list_of_norms_is_no_second_stack() -> None:
    model = skeleton("llama")
    model.model.extra = nn.ModuleList([nn.LayerNorm(48)])
    assert find_blocks(model)[0] == "model.layers"


def test_no_blocks_at_all() -> None:
    with pytest.raises(InputError, match="no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


class Stack(nn.Module):
    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


@pytest.mark.parametrize(
    ("name", "shape", "matrix", "transposed"),
    [
        ("gate_up_proj", (2, 64, 48), (64, 48), False),
        ("gate_up_proj", (2, 48, 64), (64, 48), True),
        ("down_proj", (2, 48, 64), (48, 64), False),
        ("down_proj", (2, 64, 48), (48, 64), True),
    ],
)
def test_orientation_from_name_and_size(
    name: str, shape: tuple[int, ...], matrix: tuple[int, int], transposed: bool
) -> None:
    model = skeleton("llama")
    model.model.layers[0].mlp = nn.ModuleDict({"experts": Stack(name, *shape)})
    refs = [r for r in describe(model).matrices if r.kind == "expert"]
    assert [r.name for r in refs] == [f"model.layers.0.mlp.experts.{e}.{name}" for e in range(2)]
    assert {(r.shape, r.transposed) for r in refs} == {(matrix, transposed)}


@pytest.mark.parametrize(("name", "shape"), [("gate_up_proj", (2, 48, 48)), ("mystery", (2, 64, 48))])
def test_unclear_orientation_is_refused(name: str, shape: tuple[int, ...]) -> None:
    model = skeleton("llama")
    model.model.layers[0].mlp = nn.ModuleDict({"experts": Stack(name, *shape)})
    with pytest.raises(InputError, match="neither its name nor its sizes"):
        describe(model)

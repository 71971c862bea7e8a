"""Packed modules on their own: results, moving without converting, state dicts, copies."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from packing import random_segment, rtn
from torch import nn

from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.formats.layout import PARTS
from bitfloor.formats.native import encode, layout
from bitfloor.ops import packed_native
from bitfloor.ops.backend import reference
from bitfloor.ops.reference import packed_linear
from bitfloor.runtime.linear import (
    PackedEmbedding,
    PackedLinear,
    PackedMatrix,
    TiedHead,
    cache_weights,
    convert_embedding,
    use_huge_pages,
)


def _weight() -> PackedWeight:
    generator = torch.Generator().manual_seed(2)
    first = random_segment(generator, 40, 24, 4)
    second = random_segment(generator, 40, 36, 1, start=24, zero="offset", channel_scale=True)
    return PackedWeight((40, 60), (first, second), torch.randperm(60, generator=generator))


def _fill(module: PackedMatrix, weight: PackedWeight) -> None:
    module.load_parts({name.rpartition(".")[2]: tensor for name, tensor in encode("m", weight).items()})


def _linear(weight: PackedWeight, bias: bool = True) -> PackedLinear:
    module = PackedLinear(layout(weight), bias=bias)
    _fill(module, weight)
    if bias:
        module.bias.data.normal_(generator=torch.Generator().manual_seed(9))
    return module


def test_a_linear_layer_multiplies_with_its_matrix() -> None:
    weight = _weight()
    module = _linear(weight)
    x = torch.randn(2, 5, 60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), nn.functional.linear(x, dequantize(weight), module.bias))
    assert (module.in_features, module.out_features) == (60, 40)
    assert torch.equal(dequantize(module.packed()), dequantize(weight)) and torch.equal(
        module.dense(), dequantize(weight)
    )
    assert "24x4bit+36x1bit" in repr(module)


def test_a_rotated_matrix_is_multiplied_with_a_rotated_input() -> None:
    weight = replace(_weight(), rotation=16)
    module = _linear(weight)
    x = torch.randn(2, 5, 60, generator=torch.Generator().manual_seed(0))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(module(x), nn.functional.linear(x, dequantize(weight), module.bias), **close)
    torch.testing.assert_close(packed_linear(x, weight, module.bias), module(x))
    assert torch.equal(module.dense(), dequantize(weight))
    expected = module(x)
    module.cache_weights()
    torch.testing.assert_close(module(x), expected, **close)


def test_gradients_reach_the_input() -> None:
    module, x = _linear(_weight()), torch.randn(3, 60, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.dense().sum(0).expand(3, -1), rtol=1e-5, atol=1e-4)  # float32 sum of 40 rows


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_converting_the_model_does_not_touch_stored_tensors(convert: Any) -> None:
    weight = _weight()
    module = _linear(weight)
    before = {name: tensor.clone() for name, tensor in module.named_buffers() if name in PARTS}
    convert(module)
    after = dict(module.named_buffers())
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert module.weight.dtype == module.compute.dtype == module.bias.dtype != torch.float32
    x = torch.randn(2, 60).to(module.compute.dtype)
    assert module(x).dtype == x.dtype


def test_a_module_made_on_meta_is_filled_later() -> None:
    module = PackedLinear(layout(_weight()), device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in module.buffers())
    module.to_empty(device="cpu")
    assert module.scale.dtype == torch.float16 and module.codes.device.type == "cpu"
    _fill(module, _weight())
    assert torch.equal(dequantize(module.packed()), dequantize(_weight()))


def test_a_state_dict_holds_what_is_on_disk_and_nothing_else() -> None:
    module = _linear(_weight())
    stored = {name.removeprefix("m."): tensor for name, tensor in encode("m", _weight()).items()}
    state = module.state_dict()
    assert set(state) == {*stored, "bias"}
    other = PackedLinear(layout(_weight()), bias=True)
    other.load_state_dict(state)
    assert all(torch.equal(other.get_buffer(name), tensor) for name, tensor in stored.items())


def test_a_shared_order_is_held_once_and_copies_keep_sharing() -> None:
    weight = _weight()
    first = _linear(weight, bias=False)
    second = PackedLinear(layout(weight), order_from=first)
    _fill(second, weight)
    assert "order" not in second.state_dict()
    both = copy.deepcopy(nn.ModuleList([first, second]))
    both[0].order.copy_(both[0].order.flip(0))
    assert torch.equal(both[1].dense(), both[0].dense()) and not torch.equal(both[1].dense(), second.dense())


def test_the_cache_keeps_and_drops_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(_linear(_weight()))
    x = torch.randn(3, 60, generator=torch.Generator().manual_seed(0))
    with reference():
        plain = model(x)
    torch.testing.assert_close(model(x), plain)
    cache_weights(model)
    assert torch.equal(model(x), plain)
    monkeypatch.setattr(PackedMatrix, "panel", None)  # from here on only the cache can answer
    assert torch.equal(model(x), plain)
    assert set(model.state_dict()) == set(nn.Sequential(_linear(_weight())).state_dict())
    monkeypatch.undo()
    model.to(torch.bfloat16)  # drops it
    assert model(x.bfloat16()).dtype == torch.bfloat16
    cache_weights(model, False)
    assert model[0]._dense is None


def test_the_stand_in_has_the_looks_of_a_weight_and_no_values() -> None:
    stand_in = _linear(_weight()).weight
    assert stand_in.shape == (40, 60) and stand_in.dtype == torch.float32
    assert stand_in.isnan().all() and stand_in.untyped_storage().nbytes() == 4


def test_an_embedding_looks_rows_up_and_its_head_shares_the_matrix() -> None:
    weight = rtn(torch.randn(50, 20, generator=torch.Generator().manual_seed(0)), 4, 16)
    embedding = PackedEmbedding(layout(weight, "embedding"))
    _fill(embedding, weight)
    head = TiedHead(embedding)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    dense = dequantize(weight)
    ids = torch.tensor([[0, 49], [16, 16]])
    assert torch.equal(embedding(ids), dense[ids])
    assert embedding(torch.empty(1, 0, dtype=torch.long)).shape == (1, 0, 20)
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(x), x @ dense.T)
    assert not [name for name in model.state_dict() if name.startswith("head")]
    cache_weights(model)
    assert torch.equal(head(x), x @ dense.T) and torch.equal(embedding(ids), dense[ids])
    copied = copy.deepcopy(model)
    assert copied["head"]._source[0] is copied["embedding"]
    assert copied.to(torch.bfloat16)["head"](x.bfloat16()).dtype == torch.bfloat16


def test_huge_pages_change_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = rtn(torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0)), 8, 128)
    module = _linear(weight, bias=False)
    before, x = module.codes.clone(), torch.randn(1, 2048, generator=torch.Generator().manual_seed(1))
    y = module(x)
    asked: list[int] = []
    library = packed_native.load().library
    if library is not None:
        ask = library.ask_for_huge_pages
        monkeypatch.setattr(library, "ask_for_huge_pages", lambda codes: asked.append(codes.numel()) or ask(codes))
    use_huge_pages(nn.ModuleList([module, _linear(_weight())]))
    assert torch.equal(module.codes, before) and torch.equal(module(x), y)
    assert asked == ([before.numel()] if library is not None else [])


class _ScaledWordEmbedding(nn.Embedding):
    """As in Gemma: scales what the lookup returns, and asks the weight for its dtype."""

    def __init__(self, count: int, width: int, factor: float) -> None:
        super().__init__(count, width)
        self.factor = nn.Buffer(torch.tensor(factor), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.factor.to(self.weight.dtype)


def test_a_scaling_embedding_keeps_scaling() -> None:
    module = _ScaledWordEmbedding(50, 20, 3.0).to(torch.bfloat16)
    weight = rtn(module.weight.detach().float(), 8, 16)
    packed = convert_embedding(module, layout(weight, "embedding"))
    _fill(packed, weight)
    ids = torch.tensor([3, 40])
    assert torch.equal(packed(ids), dequantize(weight, torch.bfloat16)[ids] * 3)
    assert isinstance(packed, _ScaledWordEmbedding) and not list(packed.parameters())
    assert type(convert_embedding(_ScaledWordEmbedding(4, 4, 1.0), layout(rtn(torch.ones(4, 4), 8, 4)))) is type(packed)

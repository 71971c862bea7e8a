"""Every matrix gets a storage or a reason to stay as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.methods.options import RtnConfig
from bitfloor.methods.rtn import Rtn
from bitfloor.pipeline.job import Assignment, Job, assign, check_loadable

W4, W8 = QuantSpec(4, 32), QuantSpec(8, 64)
EMBEDDING = MatrixRef("embed", "embed.weight", (70, 32), -1, "embedding")
HEAD = MatrixRef("head", "head.weight", (70, 32), -1, "head")


@dataclass(frozen=True)
class Shape:
    matrices: tuple[MatrixRef, ...]
    embedding: MatrixRef | None = EMBEDDING
    head: MatrixRef | None = HEAD
    tied: bool = False


def linear(block: int, name: str) -> MatrixRef:
    full = f"layers.{block}.{name}"
    return MatrixRef(full, f"{full}.weight", (16, 32), block, "linear")


def expert(index: int, param: str = "layers.0.experts.up") -> MatrixRef:
    path, _, name = param.rpartition(".")
    return MatrixRef(f"{path}.{index}.{name}", param, (16, 32), 0, "expert", index)


LINEARS = (linear(0, "q"), linear(0, "down"), linear(1, "q"), linear(1, "down"))


def job(embedding: QuantSpec | None = W8, head: QuantSpec | None = W8, keep: str = "?") -> Job:
    def decide(name: str) -> tuple[QuantSpec | None, str]:
        return (None, f"kept for {keep}") if keep in name else (W4, "")

    return Job(Rtn(RtnConfig("minmax")), decide, embedding, head)


def test_an_untied_model() -> None:
    found = assign(Shape(LINEARS), job(head=None, keep="1.down"))
    assert found.specs == {"layers.0.q": W4, "layers.0.down": W4, "layers.1.q": W4, "embed": W8}
    assert found.kept == {"layers.1.down": "kept for 1.down", "head": "head.bits is 16"}
    assert set(found.refs) == {*found.specs, *found.kept} and not found.tied
    assert found.of_block(1) == {"layers.1.q": W4} and found.of_block(-1) == {"embed": W8}
    assert found.of_block(7) == {}


def test_a_tied_head_is_its_embedding() -> None:
    found = assign(Shape(LINEARS, tied=True), job())
    assert found.tied and "head" not in found.refs and found.of_block(-1) == {"embed": W8}
    kept = assign(Shape(LINEARS, tied=True), job(None, None))
    assert kept.kept == {"embed": "embedding.bits is 16"}


@pytest.mark.parametrize(
    ("head", "bits"), [(None, 16), (QuantSpec(4, 64), 4), (QuantSpec(8, 32), 8)], ids=["kept", "narrow", "groups"]
)
def test_a_tied_head_that_differs_is_refused(head: QuantSpec | None, bits: int) -> None:
    with pytest.raises(InputError, match=f"head.bits is {bits} and embedding.bits is 8"):
        assign(Shape(LINEARS, tied=True), job(head=head))
    assign(Shape(LINEARS), job(head=head))  # no quarrel where there are two matrices


def test_a_stack_of_experts_is_kept_whole_or_not_at_all() -> None:
    stack = tuple(expert(i) for i in range(3))
    other = tuple(expert(i, "layers.0.experts.down") for i in range(3))
    with pytest.raises(InputError, match=r"experts stacked in layers\.0\.experts\.up"):
        assign(Shape((*stack, *other)), job(keep="experts.1.up"))
    found = assign(Shape((*stack, *other)), job(keep=".up"))
    assert len(found.kept) == 3 and len(found.specs) == 3 + 2


class Normed(nn.Linear):
    def forward(self, input: Any) -> Any:
        return super().forward(input).tanh()


def test_a_module_that_cannot_be_loaded_packed_is_refused_with_the_rule_that_keeps_it() -> None:
    skeleton = nn.ModuleDict({"a": nn.Linear(32, 16), "b": Normed(32, 16)})
    refs = {name: MatrixRef(name, f"{name}.weight", (16, 32), 0, "linear") for name in "ab"}
    check_loadable(skeleton, Assignment({"a": W4}, {"b": "why not"}, refs, False))
    with pytest.raises(InputError, match=r"b cannot be stored packed: Normed.*match: 'b', keep: true"):
        check_loadable(skeleton, Assignment({"a": W4, "b": W4}, {}, refs, False))

"""What is to be done to a model, resolved: every matrix has a storage or a reason to stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from bitfloor.core.bit_plan import BitPlan
from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.methods.allocation import SbaConfig
from bitfloor.methods.base import Batches, Method, Need
from bitfloor.runtime.swap import refusal

Decide = Callable[[str], tuple[QuantSpec | None, str]]


@dataclass(frozen=True)
class Allocation:
    """How the widths of groups are found.

    Args:
        policy: ``"sba"`` searches block by block while quantizing, ``"budget"`` solves for all before.
        average: mean width of the budget, None for each matrix's own.
        stored: the budget in stored bits a weight of the blocks' matrices, everything counted; None for ``average``.
        widths: to choose from, rising (``"budget"``).
        scope: ``"model"`` has one budget, ``"matrix"`` one for each matrix (``"budget"``).
        sequences: of the calibration text that are looked at, None for all.
        search: of ``"sba"``.
        tables: widths to choose from for embedding and head, which then share the budget; none where they keep theirs
            (``"budget"``).
        sort: order input channels by their second moment before they are cut into groups.
    """

    policy: str
    average: float | None = None
    widths: tuple[int, ...] = (1, 2, 3, 4, 5)
    scope: str = "model"
    sequences: int | None = None
    search: SbaConfig = field(default_factory=SbaConfig)
    tables: tuple[int, ...] = ()
    sort: bool = False
    stored: float | None = None

    def batches(self, inputs: Batches) -> int | None:
        """Batches that hold the sequences that are looked at, None for all."""
        if self.sequences is None or not len(inputs):
            return None
        return -(-self.sequences // inputs[0].shape[0])


@dataclass(frozen=True)
class Job:
    """A recipe in the pipeline's terms.

    Args:
        method: configured.
        decide: name of a linear to its storage, or to None and the reason why it stays as it is.
        embedding: storage of the token embedding, None to keep it.
        head: storage of the head, None to keep it. A head tied to the embedding must be stored like it.
        recipe: the resolved recipe as plain data, stored with the result.
        recipe_name: its name.
        recipe_sha256: hash of everything in it that decides the outcome.
        products: type in which the blocks' matrices are multiplied while the calibration text goes through them.
        allocation: how the widths of groups are found, None where every group has its matrix's width.
        plan: widths that are known already; then nothing is searched.
        head_by_logits: round the head towards its logits on the calibration text, not to nearest.
    """

    method: Method
    decide: Decide
    embedding: QuantSpec | None = None
    head: QuantSpec | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_name: str = ""
    recipe_sha256: str = ""
    products: torch.dtype = torch.float32
    allocation: Allocation | None = None
    plan: BitPlan | None = None
    head_by_logits: bool = False

    @property
    def searches(self) -> str | None:
        """The policy by which widths must still be found, None where they are known."""
        return None if self.allocation is None or self.plan is not None else self.allocation.policy

    @property
    def needs(self) -> frozenset[Need]:
        """What must be ready before a block can be quantized, for the method and for finding its widths."""
        searching = {Need.INPUTS, Need.HESSIAN, Need.TOGETHER} if self.searches == "sba" else set()
        return self.method.needs | searching


class ModelShape(Protocol):
    """What an assignment needs to know of a model."""

    @property
    def matrices(self) -> tuple[MatrixRef, ...]: ...
    @property
    def embedding(self) -> MatrixRef | None: ...
    @property
    def head(self) -> MatrixRef | None: ...
    @property
    def tied(self) -> bool: ...


@dataclass(frozen=True)
class Assignment:
    """The storage of every matrix.

    Args:
        specs: name to storage, for all that is quantized (embedding and untied head included).
        kept: name to the reason it stays as it is.
        refs: name to matrix, for both.
        tied: the head is the embedding; only the embedding is named.
    """

    specs: dict[str, QuantSpec]
    kept: dict[str, str]
    refs: dict[str, MatrixRef]
    tied: bool

    def of_block(self, block: int) -> dict[str, QuantSpec]:
        """The specs of one block's matrices; -1 for embedding and head."""
        return {name: spec for name, spec in self.specs.items() if self.refs[name].block == block}


def assign(model: ModelShape, job: Job) -> Assignment:
    """Give every matrix of a model its storage.

    Raises:
        InputError: a tied head that is to be stored differently from its embedding, or experts of one stack of which
            only some are kept, or a head to tune that is tied or not quantized, or one to round that is not quantized.
    """
    specs: dict[str, QuantSpec] = {}
    kept: dict[str, str] = {}
    refs = {ref.name: ref for ref in model.matrices}
    for name in refs:
        spec, reason = job.decide(name)
        if spec is None:
            kept[name] = reason
        else:
            specs[name] = spec
    _check_stacks(refs.values(), kept)
    if model.tied and job.head != job.embedding:
        raise InputError(
            f"head.bits is {_bits(job.head)} and embedding.bits is {_bits(job.embedding)}, but this model ties its "
            "head to its embedding: they are one matrix. Leave head.bits out, or set both alike."
        )
    _check_tuned_head(model, job)
    _check_head_rounding(model, job)
    ends: Iterable[tuple[MatrixRef | None, QuantSpec | None, str]] = (
        (model.embedding, job.embedding, "embedding.bits is 16"),
        (None if model.tied else model.head, job.head, "head.bits is 16"),
    )
    for ref, spec, reason in ends:
        if ref is not None:
            refs[ref.name] = ref
            if spec is None:
                kept[ref.name] = reason
            else:
                specs[ref.name] = spec
    return Assignment(specs, kept, refs, model.tied)


def check_loadable(skeleton: nn.Module, assignment: Assignment) -> None:
    """Refuse, before any work, a matrix whose packed form could not take its module's place when loading.

    Raises:
        InputError: naming the module and why.
    """
    for name in assignment.specs:
        ref = assignment.refs[name]
        owner = skeleton.get_submodule(ref.param.rpartition(".")[0])
        reason = refusal(owner, ref.kind)
        if reason is not None:
            raise InputError(
                f"{name} cannot be stored packed: {reason}. Keep it with a layer rule: "
                f"layers: [{{match: {name!r}, keep: true}}]."
            )


def _check_tuned_head(model: ModelShape, job: Job) -> None:
    if not (job.recipe.get("tune") or {}).get("head"):
        return
    if model.tied:
        raise InputError("tune.head needs a head of its own, but this model's head is its embedding; leave it out.")
    if model.head is None:
        raise InputError("tune.head needs a head, and this model has none; leave it out.")
    if job.head is None:
        raise InputError(
            "tune.head needs a quantized head, and head.bits leaves it at 16; use 8 or less, or leave it out."
        )


def _check_head_rounding(model: ModelShape, job: Job) -> None:
    if not job.head_by_logits:
        return
    if model.head is None and not model.tied:
        raise InputError("head.rounding = gptq needs a head, and this model has none; leave it out.")
    if job.head is None:
        raise InputError(
            "head.rounding = gptq needs a quantized head, and its bits are 16; use 8 or less, or leave it out."
        )


def _bits(spec: QuantSpec | None) -> int:
    return 16 if spec is None else spec.bits


def _check_stacks(refs: Iterable[MatrixRef], kept: Mapping[str, str]) -> None:
    partial: dict[str, set[bool]] = {}
    for ref in refs:
        partial.setdefault(ref.param, set()).add(ref.name in kept)
    for param, states in partial.items():
        if len(states) > 1:
            raise InputError(
                f"the recipe keeps some of the experts stacked in {param} and quantizes others; a stack is one tensor, "
                "so keep all of them or none."
            )

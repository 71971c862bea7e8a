"""The parts of a recipe, each with its allowed values in words.

Every field carries them as ``Field(description=...)``: the same words stand in error messages, so they cannot drift
apart. Values are checked strictly: ``bits: "4"`` and ``seed: true`` are refused, not converted.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bitfloor.core.spec import BITS, ROTATIONS, QuantSpec, is_rotation

WHOLE_ROW = -1
TABLE_BITS = tuple(bits for bits in BITS if bits > 1)  # of embedding and head


def _width(value: Any) -> Any:
    if type(value) is not int or value not in BITS:
        raise PydanticCustomError("width", "no such width")
    return value


def _group(value: Any) -> Any:
    if type(value) is not int or (value != WHOLE_ROW and value < 1):
        raise PydanticCustomError("group", "no such group size")
    return value


def _rotation(value: Any) -> Any:
    if type(value) is not int or not is_rotation(value):
        raise PydanticCustomError("rotation", "no such rotation")
    return value


def _centred(value: Any) -> Any:
    if type(value) is not int or value not in (0, *BITS):
        raise PydanticCustomError("centred", "no such width")
    return value


def _plain_width(value: Any) -> Any:
    if type(value) is not int or value not in (16, *TABLE_BITS):
        raise PydanticCustomError("width", "no such width")
    return value


def _table_width(value: Any) -> Any:
    if type(value) is not int or value not in TABLE_BITS:
        raise PydanticCustomError("width", "no such width")
    return value


def _plain_options(value: Any) -> Any:
    """As JSON has them: what else YAML knows (dates, infinities) would be another value in the recorded recipe."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise PydanticCustomError("options", "no plain values") from None
    return value


def as_tuple(value: Any) -> Any:
    """A list, as YAML has it, as the tuple that a frozen part holds."""
    return tuple(value) if isinstance(value, list) else value


WIDTHS = f"one of {', '.join(map(str, BITS))}"
TABLES = f"or {', '.join(map(str, reversed(TABLE_BITS)))}"
GROUPS = "a positive number of columns, or -1 for whole rows"
Width = Annotated[int, BeforeValidator(_width)]
GroupSize = Annotated[int, BeforeValidator(_group)]
CENTRED = f"0 (none), or the widest groups whose levels are centred, {WIDTHS}"
Centred = Annotated[int, BeforeValidator(_centred)]
Rotation = Annotated[int, BeforeValidator(_rotation)]
TableWidth = Annotated[int, BeforeValidator(_table_width)]
PlainWidth = Annotated[int, BeforeValidator(_plain_width)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """What holds for every part: no unknown keys, no conversions, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MethodChoice(BaseModel):
    """The method by name, its own options beside it. Which options exist is checked in ``recipe.method_options``."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(description="the name of a method, for example gptq or rtn")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SpecPart(Part):
    """How every linear is stored unless a layer rule says otherwise."""

    bits: Width = Field(description=WIDTHS)
    group_size: GroupSize = Field(description=GROUPS)
    symmetric: bool = Field(default=False, description="true or false")
    scale_dtype: Literal["float16", "bfloat16"] = Field(default="float16", description="float16 or bfloat16")

    rotation: Rotation = Field(default=0, description=ROTATIONS)
    centred: Centred = Field(default=0, description=CENTRED)

    def as_quant_spec(self) -> QuantSpec:
        found = QuantSpec(self.bits, self.group_size, self.symmetric, self.scale_dtype, self.rotation)
        return replace(found, centred=self.centred)


class LayerRule(Part):
    """A departure from the default spec for the matrices whose name a glob matches (``*`` crosses dots)."""

    match: Annotated[str, Field(min_length=1)] = Field(description="a glob on matrix names, for example '*.down_proj'")
    bits: Width | None = Field(default=None, description=WIDTHS)
    group_size: GroupSize | None = Field(default=None, description=GROUPS)
    symmetric: bool | None = Field(default=None, description="true or false")
    rotation: Rotation | None = Field(default=None, description=ROTATIONS)
    centred: Centred | None = Field(default=None, description=CENTRED)
    keep: bool = Field(default=False, description="true (the matrix stays as it is) or false")
    reason: str | None = Field(default=None, description="a few words on why a matrix is kept")

    @property
    def changes(self) -> dict[str, Any]:
        """The parts of the spec that this rule sets."""
        parts = {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "rotation": self.rotation,
            "centred": self.centred,
        }
        return {key: value for key, value in parts.items() if value is not None}

    @model_validator(mode="after")
    def _says_one_thing(self) -> LayerRule:
        if self.keep and self.changes:
            raise PydanticCustomError("rule", f"keeps the matrix and also sets {', '.join(self.changes)}; do only one")
        if not self.keep and not self.changes:
            known = "bits, group_size, symmetric, rotation, centred"
            raise PydanticCustomError("rule", f"changes nothing; give {known}, or keep: true")
        if self.reason is not None and not self.keep:
            raise PydanticCustomError("rule", "gives a reason without keep: true; remove it or keep the matrix")
        return self


class EmbeddingPart(Part):
    """Storage of the input embedding; groups run along the hidden size."""

    bits: PlainWidth = Field(default=8, description=f"16 (left as it is), {TABLES}")
    group_size: GroupSize = Field(default=64, description=GROUPS)


class HeadPart(Part):
    """Storage of the output head; ``bits: null`` means like the embedding, the only choice when the two are tied.

    ``rounding`` is the head's own matter; a tied embedding is rounded with it.
    """

    bits: PlainWidth | None = Field(
        default=None, description=f"null (like the embedding), 16 (left as it is), {TABLES}"
    )
    group_size: GroupSize = Field(default=64, description=GROUPS)
    rounding: Literal["nearest", "gptq"] = Field(default="nearest", description="nearest or gptq")


class CalibrationPart(Part):
    """The text that calibrates, and how much of it is read."""

    text: Annotated[str, Field(min_length=1)] = Field(
        default="default",
        description="default, a file (.txt, .jsonl[:field], .parquet[:field]) or hf:NAME[:config][:split][:field]",
    )
    sequences: Count = Field(default=128, description="a positive number of sequences")
    seqlen: Annotated[int, Field(ge=2)] = Field(default=512, description="a number of tokens of 2 or more")
    batch_size: Count = Field(default=8, description="a positive number of sequences")
    mode: Literal["documents", "packed", "auto"] = Field(default="auto", description="documents, packed or auto")
    min_chars: Annotated[int, Field(ge=0)] = Field(default=1500, description="a number of characters of 0 or more")
    precision: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto, float32 or bfloat16")


class AllocationPart(Part):
    """Widths that differ from group to group; ``allocation: null`` gives every group ``spec.bits``."""

    policy: Literal["sba", "budget"] = Field(default="budget", description="sba or budget")
    average: Annotated[float, Field(ge=1, le=8)] | None = Field(
        default=None, description="null (like spec.bits), or a mean width from 1 to 8 (policy budget)"
    )
    stored: Annotated[float, Field(ge=1, le=16)] | None = Field(
        default=None,
        description="null (average says it), or stored bits a weight from 1 to 16, everything counted (policy budget)",
    )
    widths: Annotated[tuple[Width, ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        default=(1, 2, 3, 4, 5), description=f"a list of widths (policy budget), each {WIDTHS}"
    )
    scope: Literal["model", "matrix"] = Field(default="model", description="model or matrix (policy budget)")
    tables: Annotated[tuple[TableWidth, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = Field(
        default=None,
        description="null (embedding and head keep theirs), or a list of widths for them, each one of "
        f"{', '.join(map(str, TABLE_BITS))} (policy budget)",
    )
    sort: bool = Field(default=False, description="true or false")
    sequences: Count | None = Field(default=None, description="null (all), or a positive number of sequences")
    uniform: bool = Field(default=False, description="true or false (policy sba)")
    ranges: Literal["minmax", "search", "gptq"] = Field(
        default="minmax", description="minmax, search or gptq (policy sba)"
    )
    positional: bool = Field(default=True, description="true or false (policy sba)")
    plan: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="null, or a file made by bitfloor allocate"
    )

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> AllocationPart:
        foreign = (
            ("average", "stored", "widths", "scope", "tables")
            if self.policy == "sba"
            else ("uniform", "ranges", "positional")
        )
        for key in foreign:
            if self.plan is None and getattr(self, key) != type(self).model_fields[key].default:
                raise PydanticCustomError("rule", f"sets {key}, which policy {self.policy} does not read; leave it out")
        if self.stored is not None and self.average is not None:
            raise PydanticCustomError("rule", "sets stored and average; a budget has one of them")
        if self.tables and self.scope == "matrix":
            raise PydanticCustomError("rule", "sets tables, which need a budget of the whole model; use scope: model")
        return self


class TunePart(Part):
    """A last stage that learns scales and norms of the whole quantized model; ``tune: null`` leaves it out."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(description="a number of updates from 1 to 1000000")
    rate: Annotated[float, Field(gt=0, le=1)] = Field(default=0.003, description="a step, more than 0 and at most 1")
    norms: bool = Field(default=True, description="true or false")
    head: bool = Field(default=False, description="true or false")


PUBLISHED_LORA = {"rank": 64, "alpha": 16, "dropout": 0.1}
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_tuple)]


class RestorePart(Part):
    """Low-rank adapters that learn on the quantized model and become part of it, before it is quantized once more.

    ``restore: null`` leaves the stage out.
    """

    objective: Literal["next-token", "distill"] = Field(default="next-token", description="next-token or distill")
    tokens: Count = Field(default=131_072, description="a positive number of tokens")
    passes: Count = Field(default=1, description="a positive number of times that the text is read")
    text: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="null (like calibration.text), or a text as there"
    )
    mode: Literal["documents", "packed", "auto"] | None = Field(
        default=None, description="null (like calibration.mode), documents, packed or auto"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.05, description="a share between 0 and 1")
    seqlen: Annotated[int, Field(ge=2)] = Field(default=512, description="a number of tokens of 2 or more")
    batch_size: Count = Field(default=1, description="a positive number of sequences")
    accumulation: Count = Field(default=2, description="a positive number of batches")
    rate: Annotated[float, Field(gt=0, le=1)] = Field(default=0.0001, description="a step, more than 0 and at most 1")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.1, description="a share of 0 or more and less than 1")
    adapter: Annotated[str, Field(min_length=1)] = Field(
        default="lora", description="the name of an adapter of peft, for example lora"
    )
    rank: Count | None = Field(default=None, description="null (64 for lora), or a positive whole number")
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="null (16 for lora), or a number more than 0"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="null (0.1 for lora), or a share of 0 or more and less than 1"
    )
    options: Annotated[dict[str, Any], BeforeValidator(_plain_options)] = Field(
        default_factory=dict,
        description="a mapping of options of the adapter in peft, of numbers, words, true, false, lists and mappings",
    )
    targets: Annotated[Globs, Field(min_length=1)] = Field(
        default=("*",), description="a list of globs on matrix names, for example ['*.q_proj', '*.v_proj']"
    )
    leave: Globs | None = Field(
        default=None, description="null (output projections of attention), or a list of globs on matrix names"
    )

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: Any) -> Any:
        """Written out for ``lora``; other adapters have their own defaults."""
        if not isinstance(data, dict) or data.get("adapter", "lora") != "lora":
            return data
        given = {key: value for key, value in data.items() if key not in PUBLISHED_LORA or value is not None}
        return {**PUBLISHED_LORA, **given}

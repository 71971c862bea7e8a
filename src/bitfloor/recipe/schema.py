"""The recipe: everything that decides *what* comes out, seed included, and nothing about *how* it is computed.

Every field carries its allowed values in words (``Field(description=...)``): the same words stand in error messages, so
they cannot drift apart. Values are checked strictly: ``bits: "4"`` and ``seed: true`` are refused, not converted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from bitfloor.core.errors import InputError
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


def _plain_width(value: Any) -> Any:
    if type(value) is not int or value not in (16, *TABLE_BITS):
        raise PydanticCustomError("width", "no such width")
    return value


def _table_width(value: Any) -> Any:
    if type(value) is not int or value not in TABLE_BITS:
        raise PydanticCustomError("width", "no such width")
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


WIDTHS = f"one of {', '.join(map(str, BITS))}"
TABLES = f"or {', '.join(map(str, reversed(TABLE_BITS)))}"
GROUPS = "a positive number of columns, or -1 for whole rows"
Width = Annotated[int, BeforeValidator(_width)]
GroupSize = Annotated[int, BeforeValidator(_group)]
Rotation = Annotated[int, BeforeValidator(_rotation)]
TableWidth = Annotated[int, BeforeValidator(_table_width)]
PlainWidth = Annotated[int, BeforeValidator(_plain_width)]
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MethodChoice(BaseModel):
    """The method by name, its own options beside it. Which options exist is checked in ``recipe.method_options``."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str = Field(description="the name of a method, for example gptq or rtn")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class SpecPart(_Part):
    """How every linear is stored unless a layer rule says otherwise."""

    bits: Width = Field(description=WIDTHS)
    group_size: GroupSize = Field(description=GROUPS)
    symmetric: bool = Field(default=False, description="true or false")
    scale_dtype: Literal["float16", "bfloat16"] = Field(default="float16", description="float16 or bfloat16")

    rotation: Rotation = Field(default=0, description=ROTATIONS)

    def as_quant_spec(self) -> QuantSpec:
        return QuantSpec(self.bits, self.group_size, self.symmetric, self.scale_dtype, self.rotation)


class LayerRule(_Part):
    """A departure from the default spec for the matrices whose name a glob matches (``*`` crosses dots)."""

    match: Annotated[str, Field(min_length=1)] = Field(description="a glob on matrix names, for example '*.down_proj'")
    bits: Width | None = Field(default=None, description=WIDTHS)
    group_size: GroupSize | None = Field(default=None, description=GROUPS)
    symmetric: bool | None = Field(default=None, description="true or false")
    rotation: Rotation | None = Field(default=None, description=ROTATIONS)
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
        }
        return {key: value for key, value in parts.items() if value is not None}

    @model_validator(mode="after")
    def _says_one_thing(self) -> LayerRule:
        if self.keep and self.changes:
            raise PydanticCustomError("rule", f"keeps the matrix and also sets {', '.join(self.changes)}; do only one")
        if not self.keep and not self.changes:
            known = "bits, group_size, symmetric, rotation"
            raise PydanticCustomError("rule", f"changes nothing; give {known}, or keep: true")
        if self.reason is not None and not self.keep:
            raise PydanticCustomError("rule", "gives a reason without keep: true; remove it or keep the matrix")
        return self


class EmbeddingPart(_Part):
    """Storage of the input embedding; groups run along the hidden size."""

    bits: PlainWidth = Field(default=8, description=f"16 (left as it is), {TABLES}")
    group_size: GroupSize = Field(default=64, description=GROUPS)


class HeadPart(_Part):
    """Storage of the output head; ``bits: null`` means like the embedding, the only choice when the two are tied.

    ``rounding`` is the head's own matter; a tied embedding is rounded with it.
    """

    bits: PlainWidth | None = Field(
        default=None, description=f"null (like the embedding), 16 (left as it is), {TABLES}"
    )
    group_size: GroupSize = Field(default=64, description=GROUPS)
    rounding: Literal["nearest", "gptq"] = Field(default="nearest", description="nearest or gptq")


class CalibrationPart(_Part):
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


class AllocationPart(_Part):
    """Widths that differ from group to group; ``allocation: null`` gives every group ``spec.bits``."""

    policy: Literal["sba", "budget"] = Field(default="budget", description="sba or budget")
    average: Annotated[float, Field(ge=1, le=8)] | None = Field(
        default=None, description="null (like spec.bits), or a mean width from 1 to 8 (policy budget)"
    )
    widths: Annotated[tuple[Width, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(
        default=(1, 2, 3, 4, 5), description=f"a list of widths (policy budget), each {WIDTHS}"
    )
    scope: Literal["model", "matrix"] = Field(default="model", description="model or matrix (policy budget)")
    tables: Annotated[tuple[TableWidth, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | None = Field(
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
            ("average", "widths", "scope", "tables") if self.policy == "sba" else ("uniform", "ranges", "positional")
        )
        for key in foreign:
            if self.plan is None and getattr(self, key) != type(self).model_fields[key].default:
                raise PydanticCustomError("rule", f"sets {key}, which policy {self.policy} does not read; leave it out")
        if self.tables and self.scope == "matrix":
            raise PydanticCustomError("rule", "sets tables, which need a budget of the whole model; use scope: model")
        return self


class TunePart(_Part):
    """A last stage that learns scales and norms of the whole quantized model; ``tune: null`` leaves it out."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(description="a number of updates from 1 to 1000000")
    rate: Annotated[float, Field(gt=0, le=1)] = Field(default=0.003, description="a step, more than 0 and at most 1")
    norms: bool = Field(default=True, description="true or false")
    head: bool = Field(default=False, description="true or false")


class Decision(NamedTuple):
    """What a recipe wants for one linear: its storage, or None and the reason why it is kept as it is."""

    spec: QuantSpec | None
    reason: str = ""


class Recipe(_Part):
    """One way to quantize a model."""

    name: str = Field(default="", description="a short name")
    description: str = Field(default="", description="one line of text")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="a whole number of 0 or more")
    method: MethodChoice = Field(description="a method with its options, for example {name: gptq}")
    spec: SpecPart = Field(description="the default storage, for example {bits: 4, group_size: 64}")
    layers: Annotated[tuple[LayerRule, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="a list of rules, each with match and what it changes"
    )
    embedding: EmbeddingPart = Field(
        default=EmbeddingPart(), description="storage of the embedding, {bits, group_size}"
    )
    head: HeadPart = Field(default=HeadPart(), description="storage of the head, {bits, group_size, rounding}")
    calibration: CalibrationPart = Field(default=CalibrationPart(), description="the calibration text and its amount")

    allocation: AllocationPart | None = Field(
        default=None, description="null, or widths by group {policy, average, ...}"
    )
    tune: TunePart | None = Field(default=None, description="null, or a last stage {steps, rate, norms, head}")

    @property
    def head_bits(self) -> int:
        """Bits of the head, after ``null`` has been read as "like the embedding"."""
        return self.embedding.bits if self.head.bits is None else self.head.bits

    def decide(self, matrix: str) -> Decision:
        """Apply the layer rules, in order, to one linear. A later rule wins, also over an earlier ``keep``."""
        changes: dict[str, Any] = {}
        kept = ""
        for rule in self.layers:
            if fnmatchcase(matrix, rule.match):
                kept = (rule.reason or f"the recipe keeps {rule.match}") if rule.keep else ""
                changes.update(rule.changes)
        if kept:
            return Decision(None, kept)
        return Decision(self.spec.model_copy(update=changes).as_quant_spec())

    def check_rules(self, matrices: Iterable[str]) -> None:
        """Refuse layer rules that no matrix of the model answers to: they are misspelt, and would do nothing.

        Raises:
            InputError: naming the rule and a matrix that does exist.
        """
        names = list(matrices)
        for index, rule in enumerate(self.layers):
            if not any(fnmatchcase(name, rule.match) for name in names):
                close = difflib.get_close_matches(rule.match, names, n=1, cutoff=0.0)
                example = f" (the closest is {close[0]})" if close else ""
                raise InputError(
                    f"layers[{index}].match = {rule.match!r} matches none of the model's {len(names)} matrices"
                    f"{example}; correct the glob or remove the rule."
                )

    def content(self) -> dict[str, Any]:
        """Everything that is *what*, as plain JSON values: the recipe without its name and description."""
        absent = {key for key in ("tune", "allocation") if getattr(self, key) is None}
        found = self.model_dump(mode="json", exclude={"name", "description", *absent})
        # What came later is left out where it is not used, so that older recipes keep their hash.
        if self.head.rounding == "nearest":
            del found["head"]["rounding"]
        if not self.spec.rotation:
            del found["spec"]["rotation"]
        for rule in found["layers"]:
            if rule["rotation"] is None:  # 0 says that the default's rotation is not wanted
                del rule["rotation"]
        if self.allocation is not None:
            for key in ("tables", "sort"):
                if not getattr(self.allocation, key):
                    del found["allocation"][key]
        if self.tune is not None and not self.tune.head:
            del found["tune"]["head"]
        return found

    def sha256(self) -> str:
        """Hash of :meth:`content`; two recipes with the same hash ask for the same bytes."""
        text = json.dumps(self.content(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def parse_recipe(data: Any, origin: str) -> Recipe:
    """Check plain data (as read from YAML) against the schema. Options of the method are not looked at.

    Args:
        data: nested mappings, lists and scalars.
        origin: what to call the source in messages: a file or preset name.

    Raises:
        InputError: one sentence with the key, the value and what is allowed there.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{origin}: a recipe is a mapping with at least method and spec, not {type(data).__name__}.")
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
        more = f" ({len(details) - 1} more after this one)" if len(details) > 1 else ""
        raise InputError(f"{origin}: {_sentence(details[0])}.{more}") from None


def unknown_key(path: str, known: Iterable[str]) -> str:
    """Words for a key that does not exist: the closest one that does, here or elsewhere, and the list."""
    parent, _, key = path.rpartition(".")
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        meant = f"{parent}.{close[0]}" if parent else close[0]
    else:
        elsewhere = _nested_keys()
        close = difflib.get_close_matches(key, elsewhere, n=1)
        meant = elsewhere[close[0]] if close else ""
    hint = f"did you mean {meant}? " if meant else ""
    return f"unknown key {path}; {hint}known {f'under {parent}' if parent else 'keys'}: {', '.join(names) or 'none'}"


def _nested_keys() -> dict[str, str]:
    """Keys one level down, each with the first dotted path that leads to it: ``bits`` to ``spec.bits``."""
    found: dict[str, str] = {}
    for name in ("method", "spec", "calibration", "allocation"):
        for key in _part_of(Recipe.model_fields[name].annotation):
            found.setdefault(key, f"{name}.{key}")
    return found


def _sentence(detail: ErrorDetails) -> str:
    location, kind = detail["loc"], detail["type"]
    path = _dotted(location)
    if kind == "extra_forbidden":
        return unknown_key(path, _fields_at(location[:-1]))
    if kind == "rule":
        return f"{path} {detail['msg']}"
    field = _field_at(location)
    allowed = field.description if field else "another value"
    if kind == "missing":
        return f"{path} is missing; it must be {allowed}"
    return f"{path} = {json.dumps(detail['input'], default=str)} is not allowed; use {allowed}"


def _dotted(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _field_at(location: tuple[int | str, ...]) -> FieldInfo | None:
    """The schema field an error points at; list indices and union branches in the location are stepped over."""
    fields: Mapping[str, FieldInfo] = Recipe.model_fields
    found: FieldInfo | None = None
    for part in location:
        if isinstance(part, str) and part in fields:
            found = fields[part]
            fields = _part_of(found.annotation)
    return found


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    field = _field_at(location)
    return list(Recipe.model_fields if field is None else _part_of(field.annotation))


def _part_of(annotation: Any) -> Mapping[str, FieldInfo]:
    """The fields of the model inside an annotation such as ``SpecPart`` or ``tuple[LayerRule, ...]``."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate.model_fields
    return {}


def check_value(annotation: Any, value: Any) -> Any:
    """Check one value strictly against a type (a whole number passes for a float); raises ``ValueError``."""
    if annotation is float and type(value) is int:
        value = float(value)
    return TypeAdapter(annotation).validate_python(value, strict=True)

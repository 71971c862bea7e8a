"""The recipe: everything that decides *what* comes out, seed included, and nothing about *how* it is computed.

What it consists of is in :mod:`bitfloor.recipe.parts`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bitfloor.core.errors import InputError
from bitfloor.core.spec import QuantSpec
from bitfloor.recipe.parts import (
    AllocationPart,
    CalibrationPart,
    EmbeddingPart,
    HeadPart,
    LayerRule,
    MethodChoice,
    Part,
    RestorePart,
    SpecPart,
    TunePart,
    as_tuple,
)

__all__ = ["MethodChoice", "Recipe", "check_value", "parse_recipe", "unknown_key"]


class Decision(NamedTuple):
    """What a recipe wants for one linear: its storage, or None and the reason why it is kept as it is."""

    spec: QuantSpec | None
    reason: str = ""


class Recipe(Part):
    """One way to quantize a model."""

    name: str = Field(default="", description="a short name")
    description: str = Field(default="", description="one line of text")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="a whole number of 0 or more, below 2^63"
    )
    method: MethodChoice = Field(description="a method with its options, for example {name: gptq}")
    spec: SpecPart = Field(description="the default storage, for example {bits: 4, group_size: 64}")
    layers: Annotated[tuple[LayerRule, ...], BeforeValidator(as_tuple)] = Field(
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
    restore: RestorePart | None = Field(
        default=None, description="null, or a fine-tune between two quantizations {tokens, objective, ...}"
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
        absent = {key for key in ("restore", "tune", "allocation") if getattr(self, key) is None}
        found = self.model_dump(mode="json", exclude={"name", "description", *absent})
        # What came later is left out where it is not used, so that older recipes keep their hash.
        for key in ("rotation", "centred"):
            if not getattr(self.spec, key):
                del found["spec"][key]
            for rule in found["layers"]:
                if rule[key] is None:  # 0 says that the default's is not wanted
                    del rule[key]
        if self.head.rounding == "nearest":
            del found["head"]["rounding"]
        if self.allocation is not None:
            for key in ("tables", "sort", "stored"):
                if not getattr(self.allocation, key):
                    del found["allocation"][key]
        if self.restore is not None and self.restore.mode is None:
            del found["restore"]["mode"]
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

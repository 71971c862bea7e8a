"""A bit plan: the width of every group of every matrix of one model, as a file that people can read and edit.

    {"bitfloor_plan": 1, "model": FINGERPRINT, "policy": "budget", "settings": {...}, "summary": {...},
     "matrices": {NAME: {"shape": [O, I], "group_size": 64, "rotation": 0, "widths": [2, 2, 3, ...], "why": {...}}}}

docs/allocation.md has the schema in words. ``why`` is what the policy knew of each group; nothing reads it back.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitfloor.core.channels import is_order, unpack_order
from bitfloor.core.errors import InputError
from bitfloor.core.spec import BITS, MatrixRef, QuantSpec

VERSION = 1
KEY = "bitfloor_plan"


@dataclass(frozen=True)
class MatrixPlan:
    """The widths of one matrix.

    Args:
        shape: ``(O, I)``.
        group_size: columns of a group, as resolved for this matrix.
        rotation: of the input channels the groups are cut from.
        widths: of every group, in natural order.
        why: what the policy knew: plain data, group by group.
        channels: order of the input channels that the groups are cut from, as bytes (:mod:`bitfloor.core.channels`);
            empty for natural order.
    """

    shape: tuple[int, int]
    group_size: int
    rotation: int
    widths: tuple[int, ...]
    why: Mapping[str, Any] = field(default_factory=dict)
    channels: bytes = b""


@dataclass(frozen=True)
class BitPlan:
    """The widths of a model.

    Args:
        model: fingerprint of the float model.
        policy: what made it.
        matrices: by name.
        settings: of the policy.
        summary: what came out, in numbers.
    """

    model: str
    policy: str
    matrices: Mapping[str, MatrixPlan]
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        matrices = {
            name: {
                "shape": list(plan.shape),
                "group_size": plan.group_size,
                "rotation": plan.rotation,
                "widths": list(plan.widths),
                **({"channels": order_text(plan.channels)} if plan.channels else {}),
                "why": dict(plan.why),
            }
            for name, plan in self.matrices.items()
        }
        head = {KEY: VERSION, "model": self.model, "policy": self.policy}
        return {**head, "settings": dict(self.settings), "summary": dict(self.summary), "matrices": matrices}

    def to_json(self) -> str:
        """As a file: sorted keys, one matrix a line."""
        head = self.to_dict()
        matrices = head.pop("matrices")
        lines = [f"    {json.dumps(name)}: {json.dumps(own, sort_keys=True)}" for name, own in sorted(matrices.items())]
        outer = json.dumps(head, indent=2, sort_keys=True)
        inner = ",\n".join(lines)
        return outer[: -len("\n}")] + ',\n  "matrices": {\n' + inner + "\n  }\n}\n"

    def sealed(self) -> BitPlan:
        """The same with its own hash in the summary, which then holds for this plan only."""
        return replace(self, summary={**self.summary, "sha256": self.sha256()})

    def sha256(self) -> str:
        """Hash of what a replay takes from it: the model and the widths."""
        widths = {
            name: [p.group_size, p.rotation, list(p.widths), *([order_text(p.channels)] if p.channels else [])]
            for name, p in self.matrices.items()
        }
        text = json.dumps([self.model, widths], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def apply(self, specs: Mapping[str, QuantSpec], refs: Mapping[str, MatrixRef], model: str) -> dict[str, QuantSpec]:
        """The specs of a model's matrices with the plan's widths.

        Args:
            specs: what is to be quantized in the blocks, by name.
            refs: the matrices, by name.
            model: fingerprint of the model.

        Raises:
            InputError: the plan is of another model, misses a matrix or names one that is not quantized, or was made
                for other groups.
        """
        if self.model != model:
            raise InputError(
                f"the plan was made for a model with fingerprint {self.model[:12]}…, and this one has {model[:12]}…; "
                "make a plan for this model with bitfloor allocate."
            )
        missing = sorted(set(specs) - set(self.matrices))
        if missing:
            raise InputError(f"the plan says nothing of {missing[0]}, which is to be quantized; make the plan again.")
        spare = sorted(set(self.matrices) - set(specs))
        if spare:
            raise InputError(f"the plan has {spare[0]}, which the recipe does not quantize; make the plan again.")
        return {name: self._applied(name, spec, refs[name]) for name, spec in specs.items()}

    def _applied(self, name: str, spec: QuantSpec, ref: MatrixRef) -> QuantSpec:
        plan = self.matrices[name]
        own = (ref.shape, spec.columns_per_group(ref.shape[1]), spec.rotation)
        for kind, given, wanted in zip(
            ("shape", "group_size", "rotation"), (plan.shape, plan.group_size, plan.rotation), own, strict=True
        ):
            if given != wanted:
                raise InputError(
                    f"the plan was made for {name} with {kind} {given}, and the recipe has {wanted}; "
                    "make the plan again, or use its recipe."
                )
        mixed = replace(spec, widths=plan.widths, channels=plan.channels)
        mixed.group_widths(ref.shape[1])
        return mixed


def read_plan(path: Path) -> BitPlan:
    """Read and check a plan file.

    Raises:
        InputError: no such file, not a plan, or a width that is not stored.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the plan {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; give a file made by bitfloor allocate.") from error
    return parse_plan(data, str(path))


def parse_plan(data: Any, where: str) -> BitPlan:
    """A plan from plain data.

    Args:
        data: as from JSON.
        where: what to call it in messages.

    Raises:
        InputError: not a plan, or a width that is not stored.
    """
    if not isinstance(data, Mapping) or KEY not in data:
        raise InputError(f"{where} is not a bit plan; give a file made by bitfloor allocate.")
    if data[KEY] != VERSION:
        raise InputError(f"{where} is a plan of version {data[KEY]}, and this bitfloor reads version {VERSION}.")
    try:
        matrices = {name: _matrix(f"{where}: {name}", entry) for name, entry in data["matrices"].items()}
        told = {key: _mapping(where, key, data) for key in ("settings", "summary")}
        return BitPlan(str(data["model"]), str(data.get("policy", "")), matrices, **told)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{where} is not a complete bit plan ({error}); make it again.") from error


def _mapping(where: str, key: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    found = data.get(key, {})
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: {key} must be a mapping; leave it out if it says nothing.")
    return found


def _matrix(where: str, entry: Mapping[str, Any]) -> MatrixPlan:
    shape, widths = entry["shape"], entry["widths"]
    numbers = [*shape, entry["group_size"], entry["rotation"], *widths]
    if len(shape) != 2 or any(type(value) is not int for value in numbers):
        raise InputError(f"{where}: shape, group_size, rotation and widths must be whole numbers.")
    for width in widths:
        if width not in BITS:
            raise InputError(f"{where}: width {width} is not one bitfloor stores; use {', '.join(map(str, BITS))}.")
    rows, columns = shape
    size = entry["group_size"]
    if size < 1 or len(widths) != -(-columns // size):
        raise InputError(f"{where}: {len(widths)} widths for {columns} columns in groups of {size}; give one a group.")
    channels = read_order(entry["channels"], columns, where) if "channels" in entry else b""
    why = _mapping(where, "why", entry)
    return MatrixPlan((rows, columns), size, entry["rotation"], tuple(widths), why, channels)


def order_text(channels: bytes) -> str:
    """An order of channels in a plan: base64 of its bytes."""
    return base64.b64encode(channels).decode("ascii")


def read_order(text: Any, columns: int, where: str) -> bytes:
    """The order of channels behind its text.

    Raises:
        InputError: not an order of so many channels.
    """
    try:
        channels = base64.b64decode(text, validate=True)
        sound = is_order(unpack_order(channels), columns)
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{where}: channels must name each of the {columns} input channels once; make the plan again.")
    return channels

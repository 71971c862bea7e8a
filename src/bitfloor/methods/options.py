"""The options of every method: plain frozen dataclasses, so that recipes are checked without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bitfloor.core.errors import InputError


def check_importance(exponent: float) -> None:
    """Refuse an exponent that is no compromise between counting channels alike (0) and their full weight (1)."""
    if not 0.0 <= exponent <= 1.0:
        raise InputError(f"importance = {exponent:g} is not an exponent between 0 (none) and 1 (full).")


@dataclass(frozen=True)
class RtnConfig:
    """Options of ``method: {name: rtn}``.

    Args:
        range: ``"search"`` (importance-weighted error, least-squares refit) or ``"minmax"`` (needs no calibration).
    """

    range: str = "search"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"range": ("search", "minmax")}


@dataclass(frozen=True)
class GptqConfig:
    """Options of ``method: {name: gptq}``.

    Args:
        range: ``"search"`` or ``"minmax"``: how the grid of a group is found.
        importance: exponent of the Hessian's diagonal as the weight of a channel in the search.
        static_groups: fix all grids before the sweep; otherwise each when the sweep reaches its group.
        damping: added to the Hessian's diagonal, relative to its mean.
        act_order: sweep columns in order of falling importance (the groups stay in natural order).
        correction: how far to move the target towards the float model's output on the float model's input, 0 to 1.
    """

    range: str = "search"
    importance: float = 1.0
    static_groups: bool = True
    damping: float = 0.01
    act_order: bool = True
    correction: float = 0.0

    def __post_init__(self) -> None:
        check_importance(self.importance)
        if not 0.0 <= self.damping <= 100.0:
            raise InputError(f"damping = {self.damping:g} is not a share of the mean diagonal; use 0 to 100.")
        if not 0.0 <= self.correction <= 1.0:
            raise InputError(f"correction = {self.correction:g} is not a share between 0 (none) and 1 (full).")

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"range": ("search", "minmax")}


OPTIONS: dict[str, type[Any]] = {"rtn": RtnConfig, "gptq": GptqConfig}

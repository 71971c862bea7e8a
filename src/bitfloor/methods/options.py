"""The options of every method: plain frozen dataclasses, so that recipes are checked without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bitfloor.core.errors import InputError


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
        range: ``"search"`` or ``"minmax"``: the grid, fixed before the columns are swept.
        damping: added to the Hessian's diagonal, relative to its mean.
        act_order: sweep columns in order of falling importance (the groups stay in natural order).
    """

    range: str = "search"
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping <= 100.0:
            raise InputError(f"damping = {self.damping:g} is not a share of the mean diagonal; use 0 to 100.")

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"range": ("search", "minmax")}


OPTIONS: dict[str, type[Any]] = {"rtn": RtnConfig, "gptq": GptqConfig}

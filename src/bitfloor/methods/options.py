"""The options of every method: plain frozen dataclasses, so that recipes are checked without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bitfloor.core.errors import InputError


def later(default: Any) -> Any:
    """An option that came later; its default is what was done before, and recipes without it keep their hash."""
    return field(default=default, metadata={"later": True})


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
        range: ``"search"`` or ``"minmax"``: how the grid of a group is found; ``"sqc"`` as SliM-LLM's code does.
        importance: exponent of the Hessian's diagonal as the weight of a channel in the search.
        static_groups: fix all grids before the sweep; otherwise each when the sweep reaches its group.
        damping: added to the Hessian's diagonal, relative to its mean.
        act_order: sweep columns in order of falling importance (the groups stay in natural order).
        correction: how far to move the target towards the float model's output on the float model's input, 0 to 1.
        sweeps: coordinate descent on codes and scales afterwards: how often every column is looked at again.
        choose: choose the correction for each matrix, among 0, 0.5 and 1, by its error on batches held out.
        sequential: let each input group see the quantized ones before it; otherwise all inputs of a block are
            observed in one pass of its float matrices, which is faster.
    """

    range: str = "search"
    importance: float = 1.0
    static_groups: bool = True
    damping: float = 0.01
    act_order: bool = True
    correction: float = 0.0
    sweeps: int = 0
    choose: bool = later(False)
    sequential: bool = later(True)

    def __post_init__(self) -> None:
        check_importance(self.importance)
        if not 0.0 <= self.damping <= 100.0:
            raise InputError(f"damping = {self.damping:g} is not a share of the mean diagonal; use 0 to 100.")
        if not 0.0 <= self.correction <= 1.0:
            raise InputError(f"correction = {self.correction:g} is not a share between 0 (none) and 1 (full).")
        if not 0 <= self.sweeps <= 1000:
            raise InputError(f"sweeps = {self.sweeps} is not a number of sweeps; use 0 (none) to 1000.")

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"range": ("search", "minmax", "sqc")}


@dataclass(frozen=True)
class SignroundConfig:
    """Options of ``method: {name: signround}``.

    Args:
        steps: updates a block; 0 is round-to-nearest.
        rate: first step of the rounding, in steps of the grid; falls linearly to zero. null is ``1 / steps``.
        range_rate: first step of the ranges' factors; null is ``rate``.
        ranges: learn the ranges too, not only the rounding.
        accumulate: batches (of ``calibration.batch_size`` sequences) an update sums.
        check_every: updates between two looks at the fixed batches that decide which step is best.
        patience: looks without a new best after which a block ends early; null = never.
    """

    steps: int = 200
    rate: float | None = None
    range_rate: float | None = None
    ranges: bool = True
    accumulate: int = 1
    check_every: int = 25
    patience: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= 1_000_000:
            raise InputError(f"steps = {self.steps} is not a number of updates; use 0 (keep the start) to 1000000.")
        for name in ("rate", "range_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise InputError(f"{name} = {value:g} is not a step; use a number from 0 to 1.")
        for name in ("accumulate", "check_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} = {value} is not allowed; use a positive number.")


@dataclass(frozen=True)
class BitfloorConfig:
    """Options of ``method: {name: bitfloor}``.

    Args:
        steps: steps a block after the start; 0 keeps the start: no back-propagation.
        rate: first step of the rounding, in steps of the grid; falls linearly to zero. The scales' factors take steps
            of half that size.
        suppress: share of the largest squared errors of a batch that its loss leaves out.
        optimizer: ``"sign"`` takes steps of one size against the signs of the gradients; ``"adamw"`` is AdamW.
        zero_share: step of the zero-points' moves, of the rounding's step; 0 keeps the zero-points.
        importance, static_groups, damping, correction, sweeps, choose, sequential: of the
            start, see :class:`GptqConfig`.
    """

    steps: int = 100
    rate: float = 0.005
    suppress: float = 0.001
    optimizer: str = later("sign")
    zero_share: float = later(0.0)
    importance: float = 1.0
    static_groups: bool = True
    damping: float = 0.01
    correction: float = 0.5
    sweeps: int = 2
    choose: bool = later(False)
    sequential: bool = later(True)

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"optimizer": ("sign", "adamw")}

    def __post_init__(self) -> None:
        SignroundConfig(steps=self.steps, rate=self.rate)
        if not 0.0 <= self.suppress < 1.0:
            raise InputError(f"suppress = {self.suppress:g} is not a share; use 0 (none) or more, and less than 1.")
        if not 0.0 <= self.zero_share <= 100.0:
            raise InputError(f"zero_share = {self.zero_share:g} is not a share of a step; use 0 (none) to 100.")
        self.start  # noqa: B018  refuses wrong options of the start

    @property
    def start(self) -> GptqConfig:
        """The start's options."""
        return GptqConfig(
            importance=self.importance,
            static_groups=self.static_groups,
            damping=self.damping,
            correction=self.correction,
            sweeps=self.sweeps,
            choose=self.choose,
            sequential=self.sequential,
        )


@dataclass(frozen=True)
class OmniquantConfig:
    """Options of ``method: {name: omniquant}``.

    Args:
        steps: updates a block; 0 keeps the start, ranges cut by 1.8% on either side.
        rate: step of AdamW on the logits of the ranges' factors.
        both: compare the block's output with two of the float block's, on the float model's inputs and on the quantized
            model's; otherwise only with the first. Costs a forward without gradients at every step.
        decay: the step falls linearly to zero; otherwise it stays, as published (at 0.01, for thousands of steps).
        accumulate, check_every, patience: see :class:`SignroundConfig`.
    """

    steps: int = 200
    rate: float = 0.1
    both: bool = True
    decay: bool = True
    accumulate: int = 1
    check_every: int = 25
    patience: int | None = None

    def __post_init__(self) -> None:
        SignroundConfig(
            steps=self.steps,
            rate=self.rate,
            accumulate=self.accumulate,
            check_every=self.check_every,
            patience=self.patience,
        )


@dataclass(frozen=True)
class Ptq161Config:
    """Options of ``method: {name: ptq161}``.

    Args:
        ratio: share of the input channels that are salient, rounded down to whole multiples; 0 and 1 leave one part.
        multiple: of which their number is; tiles of the storage hold 32 columns.
        salient_bits: width of the salient channels.
        score: what makes a channel salient: ``"max"`` of its inputs as published, their ``"mean"`` magnitude, or the
            ``"gain"``, second moment times the squared error that one bit would leave; ``"random"`` for comparison.
        range: where a row's grid of the salient part comes from: the whole ``"row"`` as published, the ``"salient"``
            columns alone, or a ``"search"`` of the least error on those.
        steps: updates a block; 0 keeps the start.
        rate: step of AdamW on the rows' spread; the factors take twice that.
        both: aim at the float block's output on either input, as published; otherwise on the float model's only.
        cosine: add the cosine term to the loss.
        check_every: updates between two looks at the fixed batches.
        patience: looks without a new best after which a block ends; null = never.
    """

    ratio: float = 0.2
    multiple: int = 32
    salient_bits: int = 4
    score: str = "max"
    range: str = "row"
    steps: int = 1000
    rate: float = 0.0005
    both: bool = True
    cosine: bool = True
    check_every: int = 50
    patience: int | None = None

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "score": ("max", "mean", "gain", "random"),
        "range": ("row", "salient", "search"),
    }

    def __post_init__(self) -> None:
        SignroundConfig(steps=self.steps, rate=self.rate, check_every=self.check_every, patience=self.patience)
        if not 0.0 <= self.ratio <= 1.0:
            raise InputError(f"ratio = {self.ratio:g} is not a share; use 0 (all at one bit) to 1 (none).")
        if self.multiple < 1:
            raise InputError(f"multiple = {self.multiple} is not a number of channels; use a positive one.")
        if self.salient_bits not in (2, 3, 4, 5, 6, 8):
            raise InputError(f"salient_bits = {self.salient_bits} is not a width; use 2, 3, 4, 5, 6 or 8.")


OPTIONS: dict[str, type[Any]] = {
    "ptq161": Ptq161Config,
    "rtn": RtnConfig,
    "gptq": GptqConfig,
    "signround": SignroundConfig,
    "bitfloor": BitfloorConfig,
    "omniquant": OmniquantConfig,
}

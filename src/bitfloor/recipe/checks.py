"""What a recipe may not ask of one model, beyond what its schema knows."""

from __future__ import annotations

from bitfloor.core.bit_plan import BitPlan
from bitfloor.core.errors import InputError
from bitfloor.core.spec import BITS
from bitfloor.methods.table import METHODS
from bitfloor.modeling.loader import SourceModel
from bitfloor.recipe.schema import Recipe


def check_widths(recipe: Recipe, source: SourceModel, plan: BitPlan | None) -> None:
    """Refuse SBA where one bit more or less is no width that is stored.

    Raises:
        InputError: naming a matrix.
    """
    if recipe.allocation is None or recipe.allocation.policy != "sba" or plan is not None:
        return
    for ref in source.map.matrices:
        spec, _ = recipe.decide(ref.name)
        unknown = [] if spec is None else [bits for bits in (spec.bits - 1, spec.bits + 1) if bits not in BITS]
        if spec is not None and unknown:
            raise InputError(
                f"allocation by sba gives some groups of {ref.name} {unknown[0]} bits beside its {spec.bits}, which "
                "are not stored; use 2 to 5 bits, or allocation.policy=budget."
            )


def check_tiers(recipe: Recipe, source: SourceModel) -> None:
    """Refuse a storage that a method with tiers of its own (PTQ1.61) would not keep to.

    Raises:
        InputError: naming a matrix.
    """
    name = recipe.method.name
    if METHODS[name].tiers is None:
        return
    if recipe.allocation is not None:
        raise InputError(f"{name} chooses whole channels and not groups; leave allocation out.")
    wanted = {"bits": 1, "group_size": -1, "rotation": 0, "symmetric": False}
    for ref in source.map.matrices:
        spec, _ = recipe.decide(ref.name)
        wrong = {} if spec is None else {k: getattr(spec, k) for k, own in wanted.items() if getattr(spec, k) != own}
        if wrong:
            raise InputError(
                f"{name} stores whole rows at one bit beside its salient channels, and {ref.name} is to have "
                + ", ".join(f"{key} = {str(value).lower()}" for key, value in wrong.items())
                + "; use "
                + " ".join(f"spec.{key}={str(wanted[key]).lower()}" for key in wrong)
                + ", or keep the matrix."
            )


# Methods that take the grids of bitfloor's own search; others have formulas of their own for ranges.
CENTRED = ("rtn", "gptq", "bitfloor")


def check_grids(recipe: Recipe, source: SourceModel) -> None:
    """Refuse the published search of ranges where it is not defined, and centred levels where they would be ignored.

    Raises:
        InputError: naming a matrix.
    """
    name, sqc = recipe.method.name, recipe.method.options.get("range") == "sqc"
    for ref in source.map.matrices:
        spec, _ = recipe.decide(ref.name)
        if spec is not None and spec.centred and (name not in CENTRED or sqc):
            what = f"{name} with method.range = sqc" if sqc else f"the method {name}"
            raise InputError(
                f"{what} finds ranges its own way, and {ref.name} is to have centred = {spec.centred}; leave it out."
            )
    if recipe.method.options.get("range") != "sqc":
        return
    for ref in source.map.matrices:
        spec, _ = recipe.decide(ref.name)
        if spec is not None and spec.symmetric:
            raise InputError(
                f"method.range = sqc is for asymmetric grids, and {ref.name} is symmetric; "
                "set its symmetric to false, or use range: search."
            )

"""What a recipe may not ask of one model, beyond what its schema knows."""

from __future__ import annotations

from bitfloor.core.bit_plan import BitPlan
from bitfloor.core.errors import InputError
from bitfloor.core.spec import BITS
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
    """Refuse a storage that PTQ1.61, which has its own, would not keep to.

    Raises:
        InputError: naming a matrix.
    """
    if recipe.method.name != "ptq161":
        return
    if recipe.allocation is not None:
        raise InputError("ptq161 chooses whole channels and not groups; leave allocation out.")
    for ref in source.map.matrices:
        spec, _ = recipe.decide(ref.name)
        if spec is not None and (spec.bits, spec.group_size, spec.rotation, spec.symmetric) != (1, -1, 0, False):
            raise InputError(
                f"ptq161 stores whole rows at one bit beside its salient channels, and {ref.name} is to have "
                f"{spec.bits} bits, groups of {spec.group_size} and rotation {spec.rotation}; use spec.bits=1 "
                "spec.group_size=-1, or keep the matrix."
            )


def check_grids(recipe: Recipe, source: SourceModel) -> None:
    """Refuse the published search of ranges where it is not defined.

    Raises:
        InputError: naming a matrix.
    """
    if recipe.method.options.get("range") != "sqc":
        return
    for ref in source.map.matrices:
        spec, _ = recipe.decide(ref.name)
        if spec is not None and spec.symmetric:
            raise InputError(
                f"method.range = sqc is for asymmetric grids, and {ref.name} is symmetric; "
                "set its symmetric to false, or use range: search."
            )

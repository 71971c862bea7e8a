"""A recipe in the pipeline's terms, for one model."""

from __future__ import annotations

from pathlib import Path

from bitfloor.core.bit_plan import read_plan
from bitfloor.core.precision import product_type
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.allocation import SbaConfig
from bitfloor.methods.table import METHODS
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.job import Allocation, Job
from bitfloor.recipe.checks import check_grids, check_tiers, check_widths
from bitfloor.recipe.method_options import build_config
from bitfloor.recipe.schema import Recipe


def make_job(recipe: Recipe, source: SourceModel, device: str = "cpu") -> Job:
    """Translate a recipe for one model, and for one device where the recipe leaves a choice to it.

    Raises:
        InputError: a layer rule that matches nothing, or a width the method does not know.
    """
    recipe.check_rules([ref.name for ref in source.map.matrices])
    plan = None
    if recipe.allocation is not None and recipe.allocation.plan is not None:
        plan = read_plan(Path(recipe.allocation.plan))
        # What decides the bytes is what is in the file.
        named = recipe.allocation.model_copy(update={"plan": f"sha256:{plan.sha256()}"})
        recipe = recipe.model_copy(update={"allocation": named})
    settled = _settled(recipe, device)
    method = METHODS[recipe.method.name]
    check_widths(recipe, source, plan)
    check_grids(recipe, source)
    check_tiers(recipe, source)
    head = recipe.embedding if recipe.head.bits is None else recipe.head
    return Job(
        method=method(build_config(recipe.method, recipe.name), recipe.seed),
        decide=recipe.decide,
        embedding=_end_spec(recipe.embedding.bits, recipe.embedding.group_size, recipe),
        head=_end_spec(head.bits or 16, head.group_size, recipe),
        recipe=settled.content(),
        recipe_name=recipe.name,
        recipe_sha256=recipe.sha256(),
        products=product_type(settled.calibration.precision, device),
        allocation=_allocation(recipe),
        plan=plan,
        head_by_logits=recipe.head.rounding == "gptq",
    )


def _allocation(recipe: Recipe) -> Allocation | None:
    """The recipe's allocation in the pipeline's terms."""
    part = recipe.allocation
    if part is None:
        return None
    importance = float(recipe.method.options.get("importance", SbaConfig.importance))
    tables = tuple(sorted(set(part.tables or ())))
    damping = float(recipe.method.options.get("damping", SbaConfig.damping))
    search = SbaConfig(part.uniform, part.ranges, importance, part.positional, damping, part.sort)
    return Allocation(
        part.policy,
        part.average,
        tuple(sorted(set(part.widths))),
        part.scope,
        part.sequences,
        search,
        tables,
        part.sort,
        part.stored,
    )


def _settled(recipe: Recipe, device: str) -> Recipe:
    """With the type of products that ``precision: auto`` means on this device; a run's fingerprint holds it too."""
    dtype = product_type(recipe.calibration.precision, device)
    chosen = recipe.calibration.model_copy(update={"precision": str(dtype).removeprefix("torch.")})
    return recipe.model_copy(update={"calibration": chosen})


def _end_spec(bits: int, group_size: int, recipe: Recipe) -> QuantSpec | None:
    return None if bits == 16 else QuantSpec(bits, group_size, scale_dtype=recipe.spec.scale_dtype)

"""``bitfloor allocate``: the width of every group, and why, without quantizing."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bitfloor.cli.console import display, pairs, print_note
from bitfloor.cli.progress import watching
from bitfloor.cli.quantize import Calibration, Device, Model, Overrides, RecipeName
from bitfloor.recipe.load import load_recipe

DEFAULT_RECIPE = "slim-llm-w2g64"


def allocate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.json", help="The plan to write.")],
    overrides: Overrides = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    calibration: Calibration = None,
    device: Device = "cpu",
) -> None:
    """Find the width of every group and write it down, with the reasons.

    Policy budget looks at the float model once; policy sba takes as long as quantizing does.
    """
    load_recipe(recipe, overrides or (), calibration=calibration)
    from bitfloor import api

    with watching() as progress:
        plan = api.allocate(
            model, out, recipe, overrides=overrides or (), calibration=calibration, device=device, progress=progress
        )
    # Embedding and head have one width each; what is known of them is not group by group.
    whole = {name for name, own in plan.matrices.items() if "tried" in own.why and "distortion" not in own.why}
    tables = {name: plan.matrices[name].widths[0] for name in plan.matrices if name in whole}
    count = Counter(width for name, own in plan.matrices.items() if name not in whole for width in own.widths)
    total = sum(count.values())
    facts = [
        (f"{width} bits", f"{number} groups, {100 * number / total:.1f}%") for width, number in sorted(count.items())
    ]
    facts += [(name, f"{width} bits") for name, width in tables.items()]
    facts.append(("stored bits a weight", f"{plan.summary['bits_per_weight']:.3f}"))
    if "gap" in plan.summary:
        facts.append(("at most to gain", f"{100 * plan.summary['gap']:.3f}%"))
    display(pairs(facts))
    calib = ["--calib", calibration] if calibration else []
    same = [str(model), "--out", "DIR", "--recipe", str(recipe), *calib, *(overrides or ()), f"allocation.plan={out}"]
    print_note(f"\nwrote {out}; next: {shlex.join(['bitfloor', 'quantize', *same])}")

"""``bitfloor quantize`` and ``bitfloor plan``: from a model to a packed folder, or to what that would cost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfloor.cli.console import display, in_bytes, in_short, pairs, print_json, print_note, table
from bitfloor.cli.inspect import summary
from bitfloor.cli.inspection import inspect_folder
from bitfloor.cli.progress import watching
from bitfloor.core.errors import BitfloorError
from bitfloor.recipe.load import load_recipe

DEFAULT_RECIPE = "gptq-w4g64"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, hub id, or .gguf file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATH.TO.KEY=VALUE]...", help="Changes to the recipe; bits= and group_size= are short forms."
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="A preset or a YAML file.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="SPEC",
        help="Calibration text: default, FILE.txt, FILE.jsonl[:field], FILE.parquet[:field] or hf:NAME.",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to compute.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


class Interrupted(BitfloorError):
    """Ctrl-C during a run that can be continued."""

    exit_code = 130


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")],
    overrides: Overrides = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    calibration: Calibration = None,
    device: Device = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run in DIR, or start it over.")
    ] = True,
    spill: Annotated[
        Path | None, typer.Option("--spill", metavar="DIR", help="Keep activations on disk here instead of in memory.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a model. The same command continues an interrupted run."""
    load_recipe(recipe, overrides or (), calibration=calibration)  # a slip is told before torch is imported
    from bitfloor import api

    try:
        with watching() as progress:
            report = api.quantize(
                model,
                out,
                recipe,
                overrides=overrides or (),
                calibration=calibration,
                device=device,
                resume=resume,
                progress=progress,
                trust_remote_code=trust_remote_code,
                spill=spill,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; finished blocks are kept, run the same command again to continue.") from None
    _finished(out, report)


def _finished(out: Path, report: Mapping[str, Any]) -> None:
    found = inspect_folder(out)
    blocks = {layer.name: layer.block_error for layer in found.layers if layer.block_error is not None}
    kept = report.get("kept") or {}
    display(summary(found))
    facts = [("quantized", f"{len(found.layers)} matrices" + (f", {len(kept)} kept as they were" if kept else ""))]
    if blocks:
        worst = max(blocks, key=blocks.__getitem__)
        facts.append(("largest block error", f"{in_short(blocks[worst])} ({block_of(worst)})"))
    display(pairs(facts))
    print_note(f'\nwrote {out}; next: bitfloor generate {out} "Once upon a time"  or  bitfloor inspect {out}')


def block_of(matrix: str) -> str:
    """The path of the block a matrix is in: ``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    found = re.match(r"(.+?\.)?\d+(?=\.)", matrix)
    return found[0] if found else matrix


def plan(
    model: Model,
    overrides: Overrides = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    calibration: Calibration = None,
    device: Device = "cpu",
    spill: Annotated[bool, typer.Option("--spill", help="Plan for activations on disk.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/cli.md has the schema).")] = False,
) -> None:
    """Show what quantize would make and need.

    Loads no weights, and refuses what does not fit in memory.
    """
    asked = load_recipe(recipe, overrides or (), calibration=calibration).allocation
    from bitfloor import api

    planned = api.plan(
        model,
        recipe,
        overrides=overrides or (),
        calibration=calibration,
        device=device,
        spill=spill,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(planned)
        return
    headings = ("matrices", "count", "shape", "bits", "group", "bytes", "kept because")
    display(table(headings, collapsed(planned["matrices"])))
    nbytes = planned["bytes"]
    display(
        pairs(
            [
                ("bits per linear weight", f"{planned['bits_per_linear_weight']:.3f}"),
                ("bits per parameter", f"{planned['bits_per_parameter']:.3f}"),
                ("size", in_bytes(nbytes["total"])),
                ("  linears", in_bytes(nbytes["linears"])),
                ("  embeddings", in_bytes(nbytes["embeddings"])),
                ("  other", in_bytes(nbytes["other"])),
                ("peak memory", in_bytes(planned["peak_memory_bytes"])),
                ("available memory", in_bytes(planned["available_memory_bytes"])),
            ],
        )
    )
    if asked is not None and asked.tables and asked.plan is None:
        print_note(
            "\nembedding and head share the blocks' budget: the size is promised, how it is divided is found later"
        )


def collapsed(matrices: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of a plan in which matrices that differ only in the numbers of their names share a row.

    Args:
        matrices: entries of ``plan()["matrices"]``.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for matrix in matrices:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", matrix["name"])
        key = (pattern, tuple(matrix["shape"]), matrix["bits"], _grouping(matrix), matrix["kept"])
        groups.setdefault(key, []).append(matrix)
    rows: list[tuple[str, ...]] = []
    for (pattern, shape, bits, grouping, kept), members in groups.items():
        rows.append(
            (
                pattern if len(members) > 1 else members[0]["name"],
                str(len(members)),
                " x ".join(map(str, shape)),
                str(bits),
                grouping,
                in_bytes(sum(member["bytes"] for member in members)),
                kept or "",
            )
        )
    return rows


def _grouping(matrix: Mapping[str, Any]) -> str:
    """``64``, or ``64, rotated 64``; ``-`` for a matrix that is kept."""
    if matrix["group_size"] is None:
        return "-"
    return f"{matrix['group_size']}" + (f", rotated {matrix['rotation']}" if matrix["rotation"] else "")

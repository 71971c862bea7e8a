"""From a full journal to a checkpoint: shards, companions, report, and ``config.json`` last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfloor.core.bit_plan import BitPlan
from bitfloor.core.errors import BitfloorError
from bitfloor.formats.atomic import atomic_file, write_json
from bitfloor.formats.layout import build_config
from bitfloor.formats.shards import CheckpointWriter
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.allocate import plan_of_run
from bitfloor.pipeline.folder import PLAN_FILE, REPORT, copy_companions, model_config
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.journal import ENDS, MERGED, TUNED, Journal, part_name, tuned_name
from bitfloor.pipeline.sizes import size_summary, stored_bytes
from bitfloor.pipeline.timing import remember


def write_checkpoint(
    source: SourceModel,
    job: Job,
    assignment: Assignment,
    journal: Journal,
    out: Path,
    plan: BitPlan | None = None,
) -> dict[str, Any]:
    """Merge the journal's parts into the finished checkpoint and remove the journal.

    Every step can be repeated: a run killed here does it again from the same parts, to the same bytes.

    Args:
        source, job, assignment, journal: of the run.
        out: the folder.
        plan: widths that were known before the first block, if they were.

    Returns:
        The report, as stored in ``bitfloor.json``.

    Raises:
        BitfloorError: a source tensor that is in no part; a damaged part; a full disk.
    """
    parts = [ENDS, *(part_name(k) for k in range(source.map.n_blocks))]
    if job.recipe.get("tune"):
        parts = [tuned_name(part) for part in parts]
    facts = {part: _facts(journal, part) for part in parts}
    layouts = {name: layout for part in parts for name, layout in facts[part]["layouts"].items()}
    kept = [*source.map.kept, *dict.fromkeys(assignment.refs[name].param for name in assignment.kept)]
    tied = _tied(source, assignment)
    source.check_accounting(layouts, kept, tied)
    writer = CheckpointWriter(out)
    for part in parts:
        writer.add_artifact(journal.path(part))
    files = writer.write()
    companions = copy_companions(source.path, out)
    report = {**make_report(source, job, assignment, facts), "made_from": journal.fingerprint, "files": files}
    report["companions"] = companions
    if job.recipe.get("tune"):
        tuning = _facts(journal, TUNED)
        report["tuning"] = {key: tuning[key] for key in ("before", "after", "step", "note", "tuned")}
    if job.recipe.get("restore"):
        report["restoration"] = _facts(journal, MERGED)
    plan = plan or plan_of_run(source, job, assignment, facts)
    if plan is None:
        (out / PLAN_FILE).unlink(missing_ok=True)
    else:
        with atomic_file(out / PLAN_FILE) as file:
            file.write(plan.to_json().encode())
        report["allocation"] = {**plan.summary, "policy": plan.policy, "sha256": plan.sha256()}
    write_json(out / REPORT, report)
    recipe = {"name": job.recipe_name, "sha256": job.recipe_sha256}
    orders = {name: first for part in facts.values() for name, first in part.get("orders", {}).items()}
    quantization = build_config(layouts, orders=orders, tied=tied, kept=kept, recipe=recipe)
    writer.finish(model_config(source.path, quantization.to_dict()))
    seconds = {name: found["seconds"] for part in facts.values() for name, found in part["reports"].items()}
    remember(journal.fingerprint, seconds)
    journal.close()
    return report


def _facts(journal: Journal, part: str) -> dict[str, Any]:
    facts = journal.facts(part)
    if facts is None:
        raise BitfloorError(f"{journal.path(part)} was damaged while the run went on; run the same command again.")
    return facts


def _tied(source: SourceModel, assignment: Assignment) -> dict[str, str]:
    embedding, head = source.map.embedding, source.map.head
    if not assignment.tied or embedding is None or head is None:
        return {}
    return {head.param: embedding.param}


def make_report(
    source: SourceModel, job: Job, assignment: Assignment, facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What was done and what it cost, as plain data; nothing in it depends on time or place."""
    matrices: dict[str, Any] = {}
    for part in facts.values():
        for name, report in part["reports"].items():
            matrices[name] = {
                "block_error": part["block_error"],
                "learning": part.get("learning"),
                "output_error": report["output_error"],
                "note": report["note"],
                **({"chosen": report["chosen"]} if "chosen" in report else {}),
            }
    layouts = {name: layout for part in facts.values() for name, layout in part["layouts"].items()}
    orders = [name for part in facts.values() for name in part.get("orders", {})]
    return {
        "recipe_name": job.recipe_name,
        "recipe_sha256": job.recipe_sha256,
        "recipe": dict(job.recipe),
        "matrices": matrices,
        "kept": dict(assignment.kept),
        **size_summary(source, assignment, stored_bytes(layouts, orders)),
    }

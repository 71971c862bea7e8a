"""What a run will make and need, from names and shapes alone: no weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.formats.layout import Layout
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.allocate import with_plan
from bitfloor.pipeline.budget import check_budget, promised_bits
from bitfloor.pipeline.job import Job, assign, check_loadable
from bitfloor.pipeline.layouts import Tiers, input_twins, spec_layout
from bitfloor.pipeline.memory import available_memory, peak_memory
from bitfloor.pipeline.restore_memory import restoring_memory
from bitfloor.pipeline.sizes import matrix_bytes, parameter_sizes, size_summary, stored_bytes

BYTE = 8


def make_plan(
    source: SourceModel, job: Job, data: tuple[int, int, int] | None, *, device: str, spill: bool
) -> dict[str, Any]:
    """Storage of every matrix, expected sizes, and the memory the run will need.

    Args:
        source: the float model.
        job: what to do.
        data: sequences, tokens in each, sequences in a batch; None when no text is read.
        device: ``"cpu"`` or ``"cuda"``.
        spill: the activations go to disk.

    Raises:
        InputError: the assignment is impossible (see :func:`bitfloor.pipeline.job.assign`).
    """
    assignment = assign(source.map, job)
    check_budget(job, assignment)
    if job.plan is not None:
        assignment = with_plan(source, assignment, job.plan)
    check_loadable(source.skeleton, assignment)
    tiers = job.method.tiers
    layouts = {name: spec_layout(assignment.refs[name], spec, tiers) for name, spec in assignment.specs.items()}
    stored = stored_bytes(layouts, _shared(source, layouts) if tiers else ())
    # Where widths are found by the run, the most that its blocks may take; single matrices are shown as if uniform.
    promised = None if job.searches is None else int(promised_bits(job, assignment) / BYTE)
    held = parameter_sizes(source)
    sizes = matrix_bytes(source, assignment, stored)
    matrices = []
    for name, ref in assignment.refs.items():
        spec = assignment.specs.get(name)
        matrices.append(
            {
                "name": name,
                "shape": list(ref.shape),
                "bits": 8 * held[ref.param][1] // held[ref.param][0] if spec is None else shown_bits(spec, ref, tiers),
                "group_size": None if spec is None else spec.columns_per_group(ref.shape[1]),
                "rotation": None if spec is None else spec.rotation,
                "bytes": sizes[name],
                "kept": assignment.kept.get(name),
            }
        )
    restoring = restoring_memory(source, job, assignment, spill=spill)  # peft is imported here, and held from then on
    peak = max(peak_memory(source, job, assignment, data, spill=spill), restoring)
    available = available_memory(device)
    return {
        "matrices": matrices,
        **size_summary(source, assignment, stored, promised),
        "peak_memory_bytes": peak,
        "available_memory_bytes": available,
        "fits": available is None or peak <= available,
    }


def _shared(source: SourceModel, layouts: Mapping[str, Layout]) -> set[str]:
    """Matrices whose order another one of their module will store."""
    ordered = {name for name, layout in layouts.items() if layout["order"] is not None}
    return {name for k in range(source.map.n_blocks) for name in input_twins(source.map.block_matrices(k), ordered)}


def shown_bits(spec: QuantSpec, ref: MatrixRef, tiers: Tiers | None = None) -> float | int:
    """The width of a matrix, or the mean of its groups' or channels' widths."""
    if tiers is not None and ref.block >= 0:
        return round(sum(columns * bits for columns, bits in tiers(ref.shape[1])) / ref.shape[1], 3)
    return round(sum(spec.widths) / len(spec.widths), 3) if spec.widths else spec.bits


def check_memory(planned: dict[str, Any], *, whole: Iterable[str] = ()) -> None:
    """Refuse a plan that does not fit.

    Args:
        planned: made by :func:`make_plan`.
        whole: stages of the recipe that hold all blocks and can be left out, by their keys.

    Raises:
        InputError: naming what is needed and what there is.
    """
    if not planned["fits"]:
        raise InputError(
            f"the run needs about {planned['peak_memory_bytes'] / 1e9:.1f} GB of memory and "
            f"{planned['available_memory_bytes'] / 1e9:.1f} GB are available; use fewer or shorter calibration "
            "sequences, a smaller calibration.batch_size, or --spill FOLDER"
            + "".join(f", or leave a stage out with {key}=null" for key in whole)
            + "."
        )

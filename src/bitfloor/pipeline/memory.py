"""The peak memory of a run, foretold from shapes alone; docs/memory.md has the formula in words."""

from __future__ import annotations

import os
from pathlib import Path

from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.methods.base import Need
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.ends import ROWS
from bitfloor.pipeline.head import TOKENS_A_CHANNEL
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.run import CHECKED
from bitfloor.pipeline.sizes import parameter_sizes

FLOAT = 4
DOUBLE = 8
BYTE = 8
# What the process takes beyond what it holds when it plans: thread pools, operator caches, allocator slack. Measured
# (bench/memory.py) and nearly constant.
OVERHEAD = 40 << 20
# Float32 copies of one panel of an embedding alive at once in the range search.
PANEL_COPIES = 10
# Float32 tensors of the shape of the stacked weights alive at once inside a solver: the permuted and moved copy, codes,
# and what the error of the result is computed from; in coordinate descent codes, errors, and copies of other strides.
SOLVER_COPIES = 4
# Bytes of a group while its scale is tuned: factor, two moments, the best so far, and the start of scale and offset at
# 16 bits each.
TUNED_GROUP = 5 * FLOAT
# Bytes of a column of a matrix with several widths: where it belongs.
TUNED_COLUMN = 4
# Float32 copies of a block's weights on the way back: dense, the stack of experts, gradients of both.
BACKWARD_COPIES = 4
# Float32 copies of a head that is learnt: dense, its gradient, and their products with codes; the codes themselves.
HEAD_COPIES = 4
# And beside those where matrices are rotated: what is rotated, and its result.
ROTATED_COPIES = 2
# Float32 tensors of the shape of a sequence's logits alive at once: both models', their logarithms, and the way back.
LOGIT_COPIES = 7
# Hidden-width and intermediate-width float32 activations of one batch alive at once inside a block's forward, and as
# many again that the allocator has not found a new use for.
HIDDEN_COPIES = 12
WIDEST_COPIES = 6
# As above, for a forward whose intermediate results are kept for the way back.
KEPT_HIDDEN_COPIES = 16
KEPT_WIDEST_COPIES = 5
# Copies of a block's quantized weights while SBA looks for widths: the matrix, and it at three widths.
CANDIDATES = 4
# Tokens that it treats at once, and float32 tensors of the shape of their outputs alive then.
SWEPT, SWEPT_COPIES = 4096, 3
# Copies of a block's weights in a survey: the leaves, and their gradients.
LEAVES = 2


def peak_memory(
    source: SourceModel, job: Job, assignment: Assignment, data: tuple[int, int, int] | None, *, spill: bool
) -> int:
    """Predicted peak resident memory of the run in bytes: the process as it is, plus the larger of its phases."""
    held = parameter_sizes(source)
    prefix = f"{source.map.blocks_path}."
    blocks = [0] * source.map.n_blocks
    for name, (count, _) in held.items():
        if name.startswith(prefix):
            blocks[int(name[len(prefix) :].split(".")[0])] += count
    hidden = int(source.config.get_text_config().hidden_size)
    streams = moving = learning = 0
    if data is not None:
        sequences, seqlen, batch = data
        batch = min(batch, sequences)
        needs = job.needs
        # The quantized model's, the float model's, and the float block's outputs beside its inputs if both are needed.
        sides = len({Need.EXACT, Need.TARGETS} & needs)
        compared = sides * sequences if sides else min(CHECKED * batch, sequences)
        streams = FLOAT * hidden * seqlen * (batch * (1 + max(sides, 1)) if spill else sequences + compared)
        widest = max((max(ref.shape) for ref in source.map.matrices), default=hidden)
        moving = FLOAT * batch * seqlen * (HIDDEN_COPIES * hidden + WIDEST_COPIES * widest)
        if Need.GRADIENTS in needs:
            kept = FLOAT * batch * seqlen * (KEPT_HIDDEN_COPIES * hidden + KEPT_WIDEST_COPIES * widest)
            rotated = ROTATED_COPIES * FLOAT if _turned(job, assignment) else 0
            learning = (job.method.learnt_bytes + rotated) * _largest_block(assignment) + kept
    # A block: its weights in float32, and once more dequantized, or what learns them.
    weights = FLOAT * max(blocks, default=0)
    block = weights + max(learning, weights + max(moving, _solver_memory(source, job, assignment)))
    if data is not None and job.searches == "sba":
        block = max(block, weights + _sba_memory(source, job, assignment, data) + moving)
    head = source.map.head
    skipped = held[head.param][0] if head is not None and not source.map.tied else 0
    outside = sum(count for name, (count, _) in held.items() if not name.startswith(prefix)) - skipped
    capture = FLOAT * outside + moving if data is not None else 0
    tuning = streams_tuned = 0
    if data is not None and job.recipe.get("tune"):
        streams_tuned = FLOAT * hidden * data[1] * (2 * min(data[2], data[0]) if spill else 2 * data[0])
        kept = FLOAT * (sum(blocks) - sum(_quantized_weights(assignment).values()))
        tuning = FLOAT * (outside + skipped) + kept + _tuning_memory(source, job, assignment, data) + weights + moving
    surveying = 0
    if data is not None and job.searches == "budget":
        surveying = max(
            weights + _survey_memory(source, assignment, data[1]),
            FLOAT * (outside + skipped) + _survey_head_memory(source, job, data[1]),
        )
    tables = _table_memory(source, job, assignment)
    looking = 0
    if data is not None and job.head_by_logits:
        # Its tokens' hidden states, and in turn what is outside, a block, and a batch's way through either.
        reads = min(sequences * seqlen, TOKENS_A_CHANNEL * hidden + batch * seqlen)
        states = FLOAT * hidden * (batch * seqlen if spill else reads)
        looking = states + FLOAT * (outside + skipped) + weights + moving
    peaks = (streams + block, streams + capture, streams_tuned + tuning, surveying, looking, tables)
    return resident_memory() + OVERHEAD + max(peaks)


def _tuning_memory(source: SourceModel, job: Job, assignment: Assignment, data: tuple[int, int, int]) -> int:
    """What tuning holds of all blocks at once, the parameters of one in the making, and a sequence's logits."""
    text = source.config.get_text_config()
    sequences, seqlen, batch = data
    codes = groups = tables = 0
    for name, spec in assignment.specs.items():
        ref = assignment.refs[name]
        rows, columns = ref.shape
        if ref.block < 0:
            learnt = ref.kind == "head" and job.recipe["tune"].get("head")
            tables += FLOAT * rows * columns * (HEAD_COPIES if learnt else 1)
        else:
            codes += held_codes(job, spec, ref.shape)
            groups += rows * -(-columns // spec.columns_per_group(columns))
    states = FLOAT * min(batch, sequences) * seqlen * int(text.hidden_size) * source.map.n_blocks
    logits = LOGIT_COPIES * FLOAT * seqlen * int(text.vocab_size)
    # The head in the type of the products, made again for every sequence.
    head = FLOAT // 2 * int(text.vocab_size) * int(text.hidden_size)
    copies = BACKWARD_COPIES + (ROTATED_COPIES if _turned(job, assignment) else 0)
    block = copies * FLOAT * _largest_block(assignment)
    return codes + TUNED_GROUP * groups + tables + states + logits + head + block


def held_codes(job: Job, spec: QuantSpec, shape: tuple[int, int]) -> int:
    """Bytes of a matrix's codes while scales are tuned: one a weight, two at 8 bits, and the order of its columns.

    Where a budget has yet to find the widths, all may be the widest.
    """
    rows, columns = shape
    widths = spec.group_widths(columns)
    if job.searches == "budget" and job.allocation is not None:
        widths = (max(spec.bits, *job.allocation.widths),) * len(widths)
    size = spec.columns_per_group(columns)
    wide = sum(min(size, columns - k * size) for k, bits in enumerate(widths) if bits == BYTE)
    ordered = job.searches is not None or len(set(widths)) > 1
    return rows * (columns + wide) + (TUNED_COLUMN * columns if ordered else 0)


def _sba_memory(source: SourceModel, job: Job, assignment: Assignment, data: tuple[int, int, int]) -> int:
    """What the search of SBA holds of a block: sums of all inputs, candidates of all matrices, and their outputs."""
    tokens = min(SWEPT, data[1] * min(data[2], data[0]))
    widest = max((ref.shape[0] for ref in source.map.matrices), default=0)
    outputs = SWEPT_COPIES * FLOAT * tokens * widest
    inputs = max(_inputs_memory(source, k) for k in range(source.map.n_blocks))
    if job.allocation is not None and job.allocation.search.ranges == "gptq":
        return inputs + _one_by_gptq(source)
    return inputs + CANDIDATES * FLOAT * _largest_block(assignment) + outputs


def _one_by_gptq(source: SourceModel) -> int:
    """What trying widths of one matrix by GPTQ holds: its sums in its basis, their factor, and copies of the matrix."""
    largest = max((ref.shape[0] * ref.shape[1] for ref in source.map.matrices), default=0)
    square = FLOAT * max((ref.shape[1] for ref in source.map.matrices), default=0) ** 2
    return 2 * square + max(2 * DOUBLE // FLOAT * square, SOLVER_COPIES * FLOAT * largest) + FLOAT * largest


def _survey_memory(source: SourceModel, assignment: Assignment, seqlen: int) -> int:
    """What the survey holds of a block, beside it: leaves and gradients, sums, one sequence, one matrix in GPTQ."""
    hidden = int(source.config.get_text_config().hidden_size)
    widest = max((max(ref.shape) for ref in source.map.matrices), default=hidden)
    kept = FLOAT * seqlen * (KEPT_HIDDEN_COPIES * hidden + KEPT_WIDEST_COPIES * widest)
    largest = max((ref.shape[0] * ref.shape[1] for ref in source.map.matrices), default=0)
    solving = _one_by_gptq(source)
    rotated = FLOAT * largest * ROTATED_COPIES
    back = LEAVES * FLOAT * _largest_block(assignment) + kept + rotated
    return max(_inputs_memory(source, k) for k in range(source.map.n_blocks)) + max(back, solving + rotated)


def _survey_head_memory(source: SourceModel, job: Job, seqlen: int) -> int:
    """What it holds at the head: a sequence's logits, and a table that is rounded on trial."""
    text = source.config.get_text_config()
    vocabulary, hidden = int(text.vocab_size), int(text.hidden_size)
    logits = LOGIT_COPIES * FLOAT * seqlen * vocabulary + FLOAT // 2 * vocabulary * hidden
    assert job.allocation is not None
    panel = PANEL_COPIES * FLOAT * min(ROWS, vocabulary) * hidden
    return logits + (FLOAT * vocabulary * hidden + panel if job.allocation.tables else 0)


def _inputs_memory(source: SourceModel, block: int) -> int:
    """``X^T X`` of all inputs of a block."""
    refs = source.map.block_matrices(block)
    groups = {next(i for i, first in enumerate(refs) if _together(first, other)) for other in refs}
    return FLOAT * sum(refs[i].shape[1] ** 2 for i in groups)


def _turned(job: Job, assignment: Assignment) -> bool:
    """Whether any matrix is stored in another basis than its input channels as they are, and copied on the way."""
    return any(_in_basis(job, spec) for spec in assignment.specs.values())


def _in_basis(job: Job, spec: QuantSpec) -> bool:
    """Whether a matrix is rotated, or its channels are or will be sorted."""
    sorting = job.searches is not None and job.allocation is not None and job.allocation.sort
    return bool(spec.rotation or spec.channels or sorting)


def _largest_block(assignment: Assignment) -> int:
    """Quantized weights of the block that has most of them."""
    return max(_quantized_weights(assignment).values(), default=0)


def _quantized_weights(assignment: Assignment) -> dict[int, int]:
    """How many there are in each block."""
    counts: dict[int, int] = {}
    for name in assignment.specs:
        ref = assignment.refs[name]
        if ref.block >= 0:
            counts[ref.block] = counts.get(ref.block, 0) + ref.shape[0] * ref.shape[1]
    return counts


def _table_memory(source: SourceModel, job: Job, assignment: Assignment) -> int:
    """Embedding and head, one after the other: the table as stored, and panels of it while they are quantized."""
    hidden = int(source.config.get_text_config().hidden_size)
    solving = (FLOAT + 3 * DOUBLE) * hidden**2 if job.head_by_logits else 0  # the Hessian, and its factor in the making
    held = parameter_sizes(source)
    worst = 0
    for name, ref in assignment.refs.items():
        if ref.block < 0:
            panel = FLOAT * min(ROWS, ref.shape[0]) * ref.shape[1] if name in assignment.specs else 0
            worst = max(worst, 2 * held[ref.param][1] + PANEL_COPIES * panel)
    return worst + solving


def _solver_memory(source: SourceModel, job: Job, assignment: Assignment) -> int:
    """The most that solving one input group takes, over all groups."""
    needs = job.needs
    worst = 0
    for ref in source.map.matrices:
        if ref.name not in assignment.specs:
            continue
        peers = [other for other in source.map.block_matrices(ref.block) if _together(ref, other)]
        stacked = FLOAT * sum(other.shape[0] * other.shape[1] for other in peers)
        stack = stacked * ((len(peers) > 1) + _in_basis(job, assignment.specs[ref.name]))
        square = FLOAT * ref.shape[1] ** 2
        memory = stack + SOLVER_COPIES * stacked
        if Need.HESSIAN in needs:
            # Those of one stage are alive at once: one, or one an expert; with their drift if the method measures it.
            block = source.map.block_matrices(ref.block)
            if Need.TOGETHER in needs:
                groups = {next(i for i, first in enumerate(block) if _together(first, other)) for other in block}
                alive = FLOAT * sum(block[i].shape[1] ** 2 for i in groups)
            else:
                alive = square * max(1, sum(1 for other in block if other.param == ref.param))
            kinds = (2 if Need.EXACT in needs else 1) * (2 if Need.HELD_OUT in needs else 1)
            sums = kinds * (alive + (square if _in_basis(job, assignment.specs[ref.name]) else 0))
            memory = stack + sums + square + max(2 * DOUBLE // FLOAT * square, SOLVER_COPIES * stacked)
        worst = max(worst, memory)
    return worst


def _together(ref: MatrixRef, other: MatrixRef) -> bool:
    """Whether two matrices may be solved as one: those of one module with the same number of inputs, no experts."""
    if ref.kind == "expert" or other.kind == "expert":
        return ref.name == other.name
    parents = (ref.name.rpartition(".")[0], other.name.rpartition(".")[0])
    return parents[0] == parents[1] and ref.shape[1] == other.shape[1]


def resident_memory() -> int:
    """Resident bytes of this process, 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def available_memory(device: str) -> int | None:
    """Bytes of main memory this process may hold in all, None where the system does not say.

    For a GPU run the blocks live on the device; main memory still bounds the streams, so it is what is checked.
    """
    del device
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 + resident_memory()
    except OSError:
        pass
    return None

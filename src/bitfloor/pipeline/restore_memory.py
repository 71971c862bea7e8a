"""The memory of a restoration, foretold from shapes; docs/memory.md has the formula in words."""

from __future__ import annotations

import torch

from bitfloor.modeling.adapters import check_adapter
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.lessons import find_targets, restore_config
from bitfloor.pipeline.memory import (
    FLOAT,
    HIDDEN_COPIES,
    KEPT_HIDDEN_COPIES,
    KEPT_WIDEST_COPIES,
    OVERHEAD,
    WIDEST_COPIES,
    resident_memory,
)
from bitfloor.pipeline.sizes import parameter_sizes

# Float32 copies of what adapters learn: it, its gradient, two moments, the best so far, and the state on its way to
# the journal, which has three and its best again.
LEARNT_COPIES = 5
STORED_COPIES = 4
# Float32 tensors of the shape of a batch's logits alive at once: they, their logarithms, the way back; and the float
# model's beside those, with what the divergence is made of.
LOGIT_COPIES = {"next-token": 4, "distill": 8}
# Copies of a matrix while it is merged: the change, the changed matrix, and one that is looked at or cast.
MERGE_COPIES = 3


def restoring_memory(source: SourceModel, job: Job, assignment: Assignment, *, spill: bool) -> int:
    """Predicted peak resident memory of the restoration in bytes, 0 without one.

    Raises:
        InputError: the adapters that are asked for are not possible.
    """
    config = restore_config(job)
    if config is None:
        return 0
    refs = find_targets(config, assignment).refs
    learnt = FLOAT * check_adapter(config.choice, refs)
    text = source.config.get_text_config()
    hidden, vocabulary = int(text.hidden_size), int(text.vocab_size)
    widest = max((max(ref.shape) for ref in source.map.matrices), default=hidden)
    tokens = config.batch_size * config.seqlen
    held = parameter_sizes(source)
    model = FLOAT * sum(count for count, _ in held.values())
    prefix = f"{source.map.blocks_path}."
    outside = FLOAT * sum(count for name, (count, _) in held.items() if not name.startswith(prefix))
    blocks = [0] * source.map.n_blocks
    for name, (count, _) in held.items():
        if name.startswith(prefix):
            blocks[int(name[len(prefix) :].split(".")[0])] += count
    # The rank's own activations beside a block's; a bottleneck is narrower than the hidden state.
    kept = FLOAT * tokens * (KEPT_HIDDEN_COPIES * hidden + KEPT_WIDEST_COPIES * widest)
    entering = FLOAT * tokens * hidden * source.map.n_blocks
    logits = LOGIT_COPIES[config.objective] * FLOAT * tokens * vocabulary
    products = 0
    if job.products is not torch.float32:
        # Weights in the type of the products: of a block for the way back, or of the head.
        products = FLOAT // 2 * max(max(blocks, default=0), vocabulary * hidden)
    learning = LEARNT_COPIES * learnt + max(STORED_COPIES * learnt, entering + max(kept, logits) + products)
    largest = FLOAT * max(ref.shape[0] * ref.shape[1] for ref in refs)
    merging = 2 * learnt + MERGE_COPIES * largest
    teaching = 0
    if config.objective == "distill":
        sequences = 1 if spill else config.distinct + config.judged
        teaching = FLOAT * hidden * config.seqlen * sequences + outside
        moving = FLOAT * config.seqlen * (HIDDEN_COPIES * hidden + WIDEST_COPIES * widest)
        learning = max(learning, learnt + FLOAT * max(blocks, default=0) + moving)
    return resident_memory() + OVERHEAD + model + teaching + max(learning, merging)

"""Learning a block's matrices together against the float model's output: what methods with gradients share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitfloor.methods.base import Batches, Block
from bitfloor.solvers.block_opt import Learnable, Outcome, Schedule, optimise

FIXED_BATCHES = 4  # spread over the text; they decide which step is best


def learn_block(
    block: Block,
    inputs: Batches,
    exact: Batches,
    learnables: Mapping[str, Learnable],
    schedule: Schedule,
    precision: str = "float32",
    suppress: float = 0.0,
) -> Outcome:
    """Learn all matrices of a block at once; snapshots of the best step.

    The quantized block sees what the quantized model feeds it, ``inputs``; its output is compared with the float
    block's on what the float model feeds that, ``exact``. The last position of a sequence predicts nothing and is not
    compared.

    Args:
        block: the float block.
        inputs, exact: its inputs in both models, batch by batch the same tokens.
        learnables: by matrix name; the other matrices stay float.
        schedule: how to learn.
        precision: of the block's products while it learns, see :func:`product_type`; norms, attention weights, the
            residual stream, the loss and the targets stay float32.
        suppress: share of the largest squared errors of a batch that its loss leaves out.
    """
    with torch.no_grad():
        targets = [block.forward(x, batch) for batch, x in enumerate(exact)]

    device = targets[0].device.type if targets else "cpu"
    dtype = product_type(precision, device)

    def loss(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            output = block.forward(inputs[batch], batch, weights)
        return mean_square((output.float() - targets[batch])[:, :-1], suppress)

    every = range(len(inputs))
    return optimise(learnables, loss, every, spread(every, FIXED_BATCHES), schedule)


def mean_square(difference: Tensor, suppress: float = 0.0) -> Tensor:
    """Mean of the squares, without a share of the largest ones.

    A few channels of a few tokens are a thousand times louder than the rest, and most of what is wrong with them was
    wrong before this block. Left in, they decide the signs of all gradients.

    Equation: the outlier-suppressed loss of SignRoundV2 (arXiv 2512.04746), which leaves out one in a thousand.

    Args:
        difference: any shape, float32.
        suppress: the share left out, 0 to 1, rounded down to whole elements; the mean is still over all.
    """
    squares = difference.square().flatten()
    count = int(suppress * squares.numel())
    if not count:
        return squares.mean()
    # Nothing flows back through which elements those are.
    limit = torch.topk(squares.detach(), count, sorted=True).values[-1]
    return torch.where(squares.detach() < limit, squares, squares.new_zeros(())).sum() / squares.numel()


def product_type(precision: str, device: str) -> torch.dtype:
    """The type in which matrices are multiplied.

    Args:
        precision: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the device has instructions for it
            (a processor without is several times slower with it), else float32.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older versions of torch do not say what the processor has.
        has = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def spread(batches: range, count: int) -> list[int]:
    """Some of the batches, evenly spaced; all of them when they are fewer."""
    count = min(count, len(batches))
    return [batches[i * len(batches) // count] for i in range(count)]

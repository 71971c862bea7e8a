"""Where every source tensor went: quantized, kept or tied. A tensor dropped in silence is a broken model."""

from __future__ import annotations

from collections.abc import Iterable

from bitfloor.core.errors import BitfloorError
from bitfloor.modeling.discover import ModelMap
from bitfloor.modeling.shards import TensorInfo


def check_accounting(
    parts: ModelMap, tensors: Iterable[TensorInfo], quantized: set[str], kept: set[str], tied: set[str]
) -> None:
    """Refuse unless every source tensor ends up in the output exactly once.

    Args:
        parts: the map of the model.
        tensors: the source tensors with their targets.
        quantized: public names of quantized matrices.
        kept: parameter and buffer names stored as they are.
        tied: parameter names stored once under another name.

    Raises:
        BitfloorError: a tensor that is missing or counted twice, or an expert stack quantized only in part.
    """
    refs = [*parts.matrices, *(ref for ref in (parts.embedding, parts.head) if ref is not None)]
    unknown = quantized - {ref.name for ref in refs}
    if unknown:
        raise BitfloorError(f"{sorted(unknown)[0]} was quantized but is no matrix of the model.")
    slices: dict[str, list[bool]] = {}
    for ref in refs:
        slices.setdefault(ref.param, []).append(ref.name in quantized)
    for info in tensors:
        for target in info.targets:
            done = slices.get(target, [False])
            ways = [all(done), target in kept, target in tied]
            if sum(ways) == 1 and any(done) == all(done):
                continue
            how = "only partly accounted for, or twice" if any(ways) else "neither quantized nor kept nor tied"
            raise BitfloorError(f"the source tensor {info.name} ({target}) is {how}; nothing is dropped silently.")

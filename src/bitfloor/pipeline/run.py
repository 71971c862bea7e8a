"""The block loop: load a block, quantize it, move the streams on, journal it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.called import check_called
from bitfloor.calib.capture import Call, capture
from bitfloor.calib.streams import Stream
from bitfloor.core.bit_plan import order_text
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.linalg import all_finite
from bitfloor.core.packed import PackedWeight, dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.formats import native
from bitfloor.methods.allocation import Widths, allocate_block
from bitfloor.methods.base import Batches, BlockResult, Need
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.ends import Rounding, decode_table, make_ends
from bitfloor.pipeline.events import Event, Progress, silent
from bitfloor.pipeline.head import head_rounding, shown_to_head
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.journal import ENDS, Entry, Journal, part_name
from bitfloor.pipeline.layouts import input_twins

# Batches that go through the float model too, for the reported error of each block, where the method needs none there.
CHECKED = 2


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; nothing here changes a byte of the result.

    Args:
        device: where blocks are computed.
        spill: folder for the activations of the calibration text, None to hold them in memory.
        progress: called with every event.
    """

    device: str = "cpu"
    spill: Path | None = None
    progress: Progress = silent


class Run:
    """One quantization, from the first missing part of the journal to the last.

    Args:
        source: the float model.
        job: what to do.
        assignment: the storage of every matrix.
        journal: open.
        batches: calibration tokens, int64 ``[B, T]`` each; empty when the method reads none.
        options: device and the like.
    """

    def __init__(
        self,
        source: SourceModel,
        job: Job,
        assignment: Assignment,
        journal: Journal,
        batches: Sequence[Tensor],
        options: RunOptions,
    ) -> None:
        self.source = source
        self.job = job
        self.assignment = assignment
        self.journal = journal
        self.batches = list(batches)
        self.options = options
        self.began = time.perf_counter()
        self._calls: Sequence[Sequence[Call]] = ()
        self._float: Stream | None = None
        self._quantized: Stream | None = None
        self._targets: Stream | None = None
        self._streams: list[Stream] = []  # whatever was opened, to be closed however the run ends

    def execute(self) -> None:
        """Make every part that the journal lacks.

        Raises:
            InputError: bad weights, found while loading.
            BitfloorError: the run failed; the journal keeps what was finished.
        """
        blocks = self.source.map.n_blocks
        missing = [k for k in range(blocks) if self.journal.facts(part_name(k)) is None]
        done = blocks - len(missing)
        self._tell("start", message=f"{done} of {blocks} blocks are done" if done else "")
        if self.journal.facts(ENDS) is None:
            self._tell("stage", message="embedding and head")
            self.journal.put(ENDS, make_ends(self.source, self.assignment, self.options.device, self._head_rounding()))
        if not missing:
            return
        try:
            with torch.no_grad():
                self._prepare_streams()
                self._through(missing)
        finally:
            for stream in self._streams:
                stream.close()

    def _head_rounding(self) -> Rounding | None:
        """How the head is rounded, where that depends on what reaches it; None for nearest."""
        if not self.job.head_by_logits:
            return None
        self._tell("stage", message="what reaches the head in the float model")
        spill, device = self.options.spill, self.options.device
        shown = shown_to_head(self.source, self.batches, self.job.products, device, spill)
        return head_rounding(shown, tied=self.assignment.tied)

    def _through(self, missing: Sequence[int]) -> None:
        """Make the missing blocks; lead the streams through those before them that are there."""
        made = 0
        started = time.perf_counter()
        for k in range(missing[-1] + 1):
            if k in missing:
                self._make(k)
                made += 1
                pace = (time.perf_counter() - started) / made
                self._tell_block(k, eta=pace * (len(missing) - made))
            elif self._float is not None:
                self._replay(k)

    # -- streams -------------------------------------------------------------------------------------------------

    def _prepare_streams(self) -> None:
        if Need.INPUTS not in self.job.needs:
            return
        self._tell("stage", message="reading the calibration text")
        source, device = self.source, self.options.device
        source.load_outer(device, head=False)
        try:
            batches = [batch.to(device) for batch in self.batches]
            whole = {Need.EXACT, Need.TARGETS} & self.job.needs
            compared = batches if whole else batches[:CHECKED]
            path, embedding = source.map.blocks_path, source.map.embedding
            if embedding is not None and embedding.name in self.assignment.specs:
                self._float = capture(source.skeleton, path, compared, self._new_stream("float")).hidden
                table = source.skeleton.get_parameter(embedding.param)
                decode_table(self.journal.get(ENDS), embedding.name, table)
            captured = capture(source.skeleton, path, batches, self._new_stream("quantized"))
            self._calls, self._quantized = captured.calls, captured.hidden
            if self._float is None:
                self._float = self._new_stream("float")
                for batch, _ in zip(self._quantized, compared, strict=False):
                    self._float.append(batch)
        finally:
            source.release_outer()

    def _new_stream(self, name: str) -> Stream:
        stream = Stream(folder=None if self.options.spill is None else self.options.spill / name)
        self._streams.append(stream)
        return stream

    # -- blocks --------------------------------------------------------------------------------------------------

    def _open(self, k: int) -> tuple[nn.Module, BlockRunner]:
        module = self.source.load_block(k, self.options.device)
        calls = list(self._calls[k]) if self._calls else []
        return module, BlockRunner(
            module, self.source.map.block_path(k), self.source.map.block_matrices(k), calls, self.job.products
        )

    def _make(self, k: int) -> None:
        """Quantize block ``k`` and journal it."""
        began = time.perf_counter()
        _, runner = self._open(k)
        try:
            inputs: Batches = self._quantized if self._quantized is not None else ()
            if self._quantized is not None:
                check_called(runner, self.assignment.of_block(k), self._quantized[0])
            specs, searched = self._allocated(runner, inputs, self.assignment.of_block(k))
            exact, targets = self._float_sides(runner)
            result = self.job.method.quantize_block(runner, inputs, specs, exact, targets)
            absent = sorted(set(specs) - set(result.weights))
            if absent:
                raise BitfloorError(f"the method {self.job.method.name} returned nothing for {absent[0]}.")
            for name, spec in specs.items():
                found, method = result.weights[name], self.job.method.name
                if found.rotation != spec.rotation:
                    raise BitfloorError(
                        f"the method {method} rotated {name} by {found.rotation}, not by {spec.rotation}."
                    )
                if (found.channels is not None) != bool(spec.channels):
                    raise BitfloorError(f"the method {method} did not keep to the order of the channels of {name}.")
            trim_heap()
            dense = {name: dequantize(w) for name, w in result.weights.items()}
            error = self._advance(runner, dense, targets or None)
            entry = self._entry(k, result, error, time.perf_counter() - began)
            if searched:
                entry.facts["allocation"] = {
                    name: {**asdict(found), "channels": order_text(found.channels)} for name, found in searched.items()
                }
            self.journal.put(part_name(k), entry)
        finally:
            self.source.release_block(k)

    def _allocated(
        self, runner: BlockRunner, inputs: Batches, specs: dict[str, QuantSpec]
    ) -> tuple[dict[str, QuantSpec], dict[str, Widths]]:
        """The block's storage with widths by group, where they are searched block by block; and what was found."""
        how = self.job.allocation
        if how is None or self.job.searches != "sba":
            return specs, {}
        found = allocate_block(runner, inputs, specs, how.search, how.batches(inputs))
        own = {n: replace(s, widths=found[n].widths, channels=found[n].channels) for n, s in specs.items()}
        return own, found

    def _float_sides(self, runner: BlockRunner) -> tuple[Batches, Batches]:
        """The block's inputs and outputs in the float model, as far as the method needs them.

        Outputs take the place of the inputs unless both are needed.
        """
        needs = self.job.needs
        if self._float is None:
            return (), ()
        exact: Batches = self._float if Need.EXACT in needs else ()
        if Need.TARGETS not in needs:
            return exact, ()
        if Need.EXACT not in needs:
            for i in range(len(self._float)):
                self._float[i] = runner.forward(self._float[i], i)
            return (), self._float
        if self._targets is None:
            self._targets = self._new_stream("targets")
        for i, x in enumerate(self._float):
            made = runner.forward(x, i)
            if i < len(self._targets):
                self._targets[i] = made
            else:
                self._targets.append(made)
        return exact, self._targets

    def _replay(self, k: int) -> None:
        """Move the streams through a block that an earlier run finished."""
        entry = self.journal.get(part_name(k))
        _, runner = self._open(k)
        orders = entry.facts.get("orders", {})
        try:
            weights = {
                name: dequantize(native.decode(name, layout, entry.tensors.__getitem__, orders.get(name)))
                for name, layout in entry.facts["layouts"].items()
            }
            self._advance(runner, weights)
        finally:
            self.source.release_block(k)

    def _advance(
        self, runner: BlockRunner, weights: Mapping[str, Tensor], targets: Batches | None = None
    ) -> float | None:
        """Replace both streams by the block's outputs.

        Args:
            runner: the float block.
            weights: its quantized matrices, dense.
            targets: its outputs in the float model where they are known already.

        Returns:
            the relative squared error between them, None without streams.
        """
        if self._float is None or self._quantized is None:
            return None
        above = below = 0.0
        replaced = runner.prepare(weights)
        for i in range(len(self._quantized)):
            found = runner.forward(self._quantized[i], i, replaced)
            self._quantized[i] = found
            if i < len(self._float):
                exact = runner.forward(self._float[i], i) if targets is None else targets[i]
                if targets is None:
                    self._float[i] = exact
                above += float((found - exact.to(found.device)).square().sum(dtype=torch.float64))
                below += float(exact.square().sum(dtype=torch.float64))
            elif not all_finite(found):
                above = float("nan")
        if targets is not None and targets is self._targets:
            self._float, self._targets = self._targets, self._float
        if not below < float("inf") or not above < float("inf"):
            raise BitfloorError(
                f"the block of {runner.names[0]} gives NaN or infinite outputs on the calibration text; "
                "check the weights."
            )
        return above / below if below else 0.0

    def _entry(self, k: int, result: BlockResult, error: float | None, seconds: float) -> Entry:
        """The journal's record of a block: packed matrices and everything of the block that is kept."""
        refs = self.assignment.refs
        tensors: dict[str, Tensor] = {}
        layouts: dict[str, Any] = {}
        orders = self._shared_orders(k, result.weights)
        for name, weight in result.weights.items():
            tensors.update(native.encode(name, weight, orders.get(name)))
            layouts[name] = native.layout(weight, kind=refs[name].kind, transposed=refs[name].transposed)
        prefix = f"{self.source.map.block_path(k)}."
        kept = [name for name in self.source.map.kept if name.startswith(prefix)]
        kept += [refs[name].param for name in self.assignment.kept if refs[name].block == k]
        for name in dict.fromkeys(kept):
            tensors[name] = self.source.read(name)
        reports = {
            name: {"output_error": r.output_error, "seconds": r.seconds, "note": r.note}
            | ({"chosen": dict(r.chosen)} if r.chosen else {})
            for name, r in result.reports.items()
        }
        for name, report in result.reports.items():
            if report.note:
                self._tell("note", message=f"{name}: {report.note}")
        return Entry(
            {name: tensor.cpu() for name, tensor in tensors.items()},
            {
                "layouts": layouts,
                **({"orders": orders} if orders else {}),
                "reports": reports,
                "learning": None if result.learning is None else asdict(result.learning),
                "block_error": error,
                "seconds": seconds,
            },
        )

    def _shared_orders(self, k: int, weights: Mapping[str, PackedWeight]) -> dict[str, str]:
        """Matrices that use the order that another one stores: of whole channels, where one tensor feeds both."""
        if self.job.method.tiers is None:
            return {}
        found = {name: weight.order for name, weight in weights.items() if weight.order is not None}
        twins = input_twins(self.source.map.block_matrices(k), found)
        return {name: first for name, first in twins.items() if torch.equal(found[name], found[first])}

    # -- telling -------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, **details: Any) -> None:
        seconds = time.perf_counter() - self.began
        self.options.progress(Event(kind, blocks=self.source.map.n_blocks, seconds=seconds, **details))

    def _tell_block(self, k: int, eta: float) -> None:
        facts = self.journal.facts(part_name(k)) or {}
        self._tell("block", block=k, loss=facts.get("block_error"), eta=eta)

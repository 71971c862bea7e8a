"""The block loop: load a block, quantize it, move the streams on, journal it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import Call, capture
from bitfloor.calib.streams import Stream
from bitfloor.core.errors import BitfloorError
from bitfloor.core.heap import trim_heap
from bitfloor.core.packed import dequantize
from bitfloor.formats import native
from bitfloor.methods.base import Batches, BlockResult, Need
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.ends import decode_table, make_ends
from bitfloor.pipeline.events import Event, Progress, silent
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.journal import ENDS, Entry, Journal, part_name


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
            self.journal.put(ENDS, make_ends(self.source, self.assignment, self.options.device))
        if not missing:
            return
        try:
            with torch.no_grad():
                self._prepare_streams()
                self._through(missing)
        finally:
            for stream in self._streams:
                stream.close()

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
        if Need.INPUTS not in self.job.method.needs:
            return
        self._tell("stage", message="reading the calibration text")
        source, device = self.source, self.options.device
        source.load_outer(device, head=False)
        try:
            batches = [batch.to(device) for batch in self.batches]
            captured = capture(source.skeleton, source.map.blocks_path, batches, self._new_stream("float"))
            self._calls, self._float = captured.calls, captured.hidden
            embedding = source.map.embedding
            if embedding is not None and embedding.name in self.assignment.specs:
                table = source.skeleton.get_parameter(embedding.param)
                decode_table(self.journal.get(ENDS), embedding.name, table)
                again = capture(source.skeleton, source.map.blocks_path, batches, self._new_stream("quantized"))
                self._quantized = again.hidden
            else:
                self._quantized = self._new_stream("quantized")
                for batch in self._float:
                    self._quantized.append(batch)
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
        return module, BlockRunner(module, self.source.map.block_path(k), self.source.map.block_matrices(k), calls)

    def _make(self, k: int) -> None:
        """Quantize block ``k`` and journal it."""
        began = time.perf_counter()
        _, runner = self._open(k)
        try:
            specs = self.assignment.of_block(k)
            inputs: Batches = self._quantized if self._quantized is not None else ()
            wanted = Need.EXACT in self.job.method.needs
            exact: Batches = self._float if wanted and self._float is not None else ()
            result = self.job.method.quantize_block(runner, inputs, specs, exact)
            absent = sorted(set(specs) - set(result.weights))
            if absent:
                raise BitfloorError(f"the method {self.job.method.name} returned nothing for {absent[0]}.")
            trim_heap()
            error = self._advance(runner, {name: dequantize(w) for name, w in result.weights.items()})
            self.journal.put(part_name(k), self._entry(k, result, error, time.perf_counter() - began))
        finally:
            self.source.release_block(k)

    def _replay(self, k: int) -> None:
        """Move the streams through a block that an earlier run finished."""
        entry = self.journal.get(part_name(k))
        _, runner = self._open(k)
        try:
            weights = {
                name: dequantize(native.decode(name, layout, entry.tensors.__getitem__))
                for name, layout in entry.facts["layouts"].items()
            }
            self._advance(runner, weights)
        finally:
            self.source.release_block(k)

    def _advance(self, runner: BlockRunner, weights: Mapping[str, Tensor]) -> float | None:
        """Replace both streams by the block's outputs.

        Returns:
            the relative squared error between them, None without streams.
        """
        if self._float is None or self._quantized is None:
            return None
        above = below = 0.0
        replaced = runner.prepare(weights)
        for i in range(len(self._float)):
            exact = runner.forward(self._float[i], i)
            found = runner.forward(self._quantized[i], i, replaced)
            above += float((found - exact).square().sum(dtype=torch.float64))
            below += float(exact.square().sum(dtype=torch.float64))
            self._float[i] = exact
            self._quantized[i] = found
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
        for name, weight in result.weights.items():
            tensors.update(native.encode(name, weight))
            layouts[name] = native.layout(weight, kind=refs[name].kind, transposed=refs[name].transposed)
        prefix = f"{self.source.map.block_path(k)}."
        kept = [name for name in self.source.map.kept if name.startswith(prefix)]
        kept += [refs[name].param for name in self.assignment.kept if refs[name].block == k]
        for name in dict.fromkeys(kept):
            tensors[name] = self.source.read(name)
        reports = {
            name: {"output_error": r.output_error, "seconds": r.seconds, "note": r.note}
            for name, r in result.reports.items()
        }
        for name, report in result.reports.items():
            if report.note:
                self._tell("note", message=f"{name}: {report.note}")
        return Entry(
            {name: tensor.cpu() for name, tensor in tensors.items()},
            {"layouts": layouts, "reports": reports, "block_error": error, "seconds": seconds},
        )

    # -- telling -------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, **details: Any) -> None:
        seconds = time.perf_counter() - self.began
        self.options.progress(Event(kind, blocks=self.source.map.n_blocks, seconds=seconds, **details))

    def _tell_block(self, k: int, eta: float) -> None:
        facts = self.journal.facts(part_name(k)) or {}
        self._tell("block", block=k, loss=facts.get("block_error"), eta=eta)

"""The last stage: all scales and norms of the quantized model together, towards the float model's distribution.

Blocks are quantized one after the other, each towards the float model's hidden states. What counts in the end is the
distribution of the next token. Here the codes stay, and everything small learns: the scale of every group and the
weights of norms, by AdamW on the Kullback-Leibler divergence from the float model's distribution to the quantized
one's, over the calibration text. A share of the text is held out; it decides which step is kept.

The float model runs once, block by block, and leaves its last hidden states. Of the quantized model the codes are held,
a byte a weight, and its norms; a step goes through the blocks forward, keeping their inputs, and back, computing each
again.

The result is one part of the journal; after that every part is written a second time with it. The state of the learning
is journaled too, so a killed run goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import Call, capture
from bitfloor.calib.streams import Stream
from bitfloor.methods.base import Need
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.ends import decode_table
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.journal import ENDS, STATE, TUNED, Entry, Journal, part_name, tuned_name
from bitfloor.pipeline.run import RunOptions
from bitfloor.pipeline.student import Head, Student, Update, gives_tuple, poured
from bitfloor.pipeline.whole import last_states
from bitfloor.solvers.adamw import AdamW

HELD_OUT = 8  # one batch in so many is not learnt from
LOOKS = 8  # at the held-out text, over the whole run
STORE_AFTER = 120.0  # seconds without a stored state
WARM_UP = 8  # steps, or a quarter of all


def reads_text(job: Job) -> bool:
    """Whether a job needs the calibration text: for its method, to find widths, to round the head, or to tune."""
    reads = Need.INPUTS in job.needs or job.searches is not None or job.head_by_logits
    return reads or bool(job.recipe.get("tune"))


@dataclass(frozen=True)
class TuneConfig:
    """How to tune.

    Args:
        steps: updates; each reads one batch of the calibration text.
        rate: step of AdamW for the scales' factors and the norms' weights, after a warm-up; falls linearly to zero.
        norms: learn the weights of norms too.
        head: learn the scales of a quantized head of its own too.
    """

    steps: int
    rate: float
    norms: bool = True
    head: bool = False


class Tuning:
    """The stage, from the journal of all blocks to the same journal with tuned blocks.

    Args:
        source, job, assignment, journal, batches, options: as for :class:`bitfloor.pipeline.run.Run`.
        config: how.
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
        self.config = TuneConfig(**job.recipe["tune"])
        self.norms, self.head = self.config.norms, self.config.head
        self._streams: list[Stream] = []
        self._began = time.monotonic()

    def execute(self) -> None:
        """Tune, unless the journal has the result already, and write all parts with it.

        Raises:
            BitfloorError: the run failed; the journal keeps what was finished.
        """
        if self.journal.facts(TUNED) is None:
            try:
                self.journal.put(TUNED, self._learn())
            finally:
                for stream in self._streams:
                    stream.close()
                for k in range(self.source.map.n_blocks):
                    self.source.release_block(k)
                self.source.release_outer()
        self._spread(self.journal.get(TUNED).tensors)

    def _spread(self, tensors: Mapping[str, Tensor]) -> None:
        """Write every part once more, with what was tuned; the first ones stay, for a run that must make one again."""
        for part in (ENDS, *(part_name(k) for k in range(self.source.map.n_blocks))):
            if self.journal.facts(tuned_name(part)) is None:
                entry = self.journal.get(part)
                own = {name: tensor for name, tensor in tensors.items() if name in entry.tensors}
                self.journal.put(tuned_name(part), Entry({**entry.tensors, **own}, entry.facts))

    # -- what is learnt from -----------------------------------------------------------------------------------------

    def _learn(self) -> Entry:
        with torch.no_grad():
            student, teacher = self._prepare()
        still = sum(len(part.fixed) for part in student.parts)
        if still:
            self._tell(f"tuning leaves the scales of {still} matrices: they have channel scales", kind="note")
        train, held = _share(len(self.batches))
        adam = AdamW()
        begun = self._resumed(student, adam)
        if begun is None:
            best, before = student.snapshot(), self._judged(student, teacher, held)
            progress: dict[str, Any] = {"before": before, "after": before, "step": 0, "done": 0}
            progress |= {"note": None, "tuned": sorted(student.parameters)}
        else:
            progress, best = begun
            self._tell(f"tuning: going on from step {progress['done']}")
        if not student.parameters or not math.isfinite(progress["before"]):
            progress["note"] = "nothing was tuned: " + (
                "the divergence at the start is not finite" if student.parameters else "the model has no scale or norm"
            )
        else:
            best = self._steps(student, teacher, (train, held), adam, progress, best)
        if progress["note"]:
            self._tell(progress["note"], kind="note")
        return Entry(student.stored(best), progress)

    def _steps(
        self,
        student: Student,
        teacher: Stream,
        share: tuple[Sequence[int], Sequence[int]],
        adam: AdamW,
        progress: dict[str, Any],
        best: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """All steps that are left; the best parameters. ``progress`` is kept up to date."""
        steps = self.config.steps
        every = max(1, -(-steps // LOOKS))
        warm = min(WARM_UP, max(1, steps // 4))
        stored = time.monotonic()
        for t in range(progress["done"], steps):
            rate = self.config.rate * min(1.0, (t + 1) / warm) * (1.0 - t / steps)
            batch = _drawn(share[0], t, int(self.job.recipe.get("seed", 0)))
            loss = student.step(batch, teacher[batch], _mover(adam, rate, t + 1))
            if not math.isfinite(loss):
                progress["note"] = f"tuning met a loss that is not finite; step {progress['step']} of {t} is kept"
                return best
            progress["done"] = t + 1
            look = (t + 1) % every == 0 or t + 1 == steps
            if look:
                now = self._judged(student, teacher, share[1])
                if now < progress["after"]:
                    progress |= {"after": now, "step": t + 1}
                    best = student.snapshot()
                before = progress["before"]
                self._tell(f"tuning: step {t + 1} of {steps}, held-out divergence {now:.4g} ({before:.4g} before)")
            if t + 1 < steps and (look or time.monotonic() - stored > STORE_AFTER):
                self._store(student, adam, best, progress)
                stored = time.monotonic()
        return best

    def _judged(self, student: Student, teacher: Stream, held: Sequence[int]) -> float:
        """Mean divergence over the tokens of the held-out batches."""
        counts = [self.batches[i].numel() for i in held]
        found = [student.divergence(i, teacher[i]) * count for i, count in zip(held, counts, strict=True)]
        return sum(found) / sum(counts)

    def _prepare(self) -> tuple[Student, Stream]:
        """The quantized model's small parameters, and the float model's last hidden states."""
        source, device = self.source, self.options.device
        self._tell("tuning: the float model's last hidden states")
        batches = [batch.to(device) for batch in self.batches]
        source.load_outer(device)
        path, embedding = source.map.blocks_path, source.map.embedding
        teacher = self._stream("float")
        last_states(source, batches, teacher, self.job.products, device)
        head = Head(source, self.job.products, as_tuple=gives_tuple(source, batches[0], device))
        tables = {}
        entry = self.journal.get(ENDS)
        for ref in (source.map.embedding, source.map.head):
            if ref is not None and ref.name in entry.facts["layouts"]:
                tables[ref.param] = torch.empty_like(source.skeleton.get_parameter(ref.param))
                decode_table(entry, ref.name, tables[ref.param])
        inputs = self._stream("tuned")
        with poured(source, tables if embedding is not None else {}):
            again = capture(source.skeleton, path, batches, inputs)
        if embedding is not None and not self.assignment.tied:
            tables.pop(embedding.param, None)  # what enters the first block is known now
        return Student(self, again.calls, inputs, batches, head, tables), teacher

    def runner(self, k: int, calls: Sequence[Sequence[Call]]) -> BlockRunner:
        source = self.source
        module = source.load_block(k, self.options.device)
        return BlockRunner(module, source.map.block_path(k), source.map.block_matrices(k), calls[k], self.job.products)

    def _stream(self, name: str) -> Stream:
        stream = Stream(folder=None if self.options.spill is None else self.options.spill / name)
        self._streams.append(stream)
        return stream

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _store(self, student: Student, adam: AdamW, best: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        tensors = {f"now.{name}": tensor for name, tensor in student.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
        tensors |= {f"moments.{name}": tensor for name, tensor in adam.moments.items()}
        self.journal.put(STATE, Entry({name: tensor.cpu() for name, tensor in tensors.items()}, dict(progress)))

    def _resumed(self, student: Student, adam: AdamW) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Progress and best parameters of a run that was interrupted; its state is put back."""
        if self.journal.facts(STATE) is None:
            return None
        entry = self.journal.get(STATE)
        device = self.options.device

        def of(kind: str) -> dict[str, Tensor]:
            found = {n.removeprefix(kind): t.to(device) for n, t in entry.tensors.items() if n.startswith(kind)}
            return found

        student.restore(of("now."))
        adam.moments = of("moments.")
        return dict(entry.facts), of("best.")

    def _tell(self, message: str, kind: str = "stage") -> None:
        seconds = time.monotonic() - self._began
        self.options.progress(Event(kind, blocks=self.source.map.n_blocks, seconds=seconds, message=message))


def _mover(adam: AdamW, rate: float, t: int) -> Update:
    return lambda name, parameter, grad: adam.step(name, parameter, grad, rate, t)


def _share(count: int) -> tuple[list[int], list[int]]:
    """Batches to learn from, and those held out: every so many, at least one."""
    held = list(range(HELD_OUT - 1, count, HELD_OUT)) or [0]
    return [i for i in range(count) if i not in held], held


def _drawn(train: Sequence[int], t: int, seed: int) -> int:
    """The batch of step ``t``: all in random order, then again in another."""
    turn, at = divmod(t, len(train))
    generator = torch.Generator().manual_seed(seed + turn)
    return train[int(torch.randperm(len(train), generator=generator)[at])]

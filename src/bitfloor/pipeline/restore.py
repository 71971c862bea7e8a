"""Between two quantizations: adapters learn on the first one's result and are merged into it.

The dequantized model is frozen and held whole. Low-rank adapters on its matrices learn to predict the next token, or
the float model's distribution of it. A share of the text is held out; it decides which state of the adapters is kept,
the start included. What they make of the weights is a float model again, the source of the second quantization.

Only what enters each block is kept for the way back; the block is computed again there. The state of the learning is
journaled, so a killed run goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from bitfloor.calib.streams import Stream
from bitfloor.core.heap import trim_heap
from bitfloor.core.packed import dequantize
from bitfloor.formats import native
from bitfloor.modeling.adapters import Adapters
from bitfloor.modeling.loader import SourceModel
from bitfloor.pipeline.ends import decode_table
from bitfloor.pipeline.events import Event
from bitfloor.pipeline.job import Assignment, Job
from bitfloor.pipeline.journal import ADAPTERS, ENDS, RESTORING, Entry, Journal, part_name
from bitfloor.pipeline.lessons import Lessons, RestoreConfig, Targets
from bitfloor.pipeline.run import RunOptions
from bitfloor.pipeline.student import Head, gives_tuple
from bitfloor.pipeline.whole import last_states
from bitfloor.solvers.adamw import AdamW

LOOKS = 8  # at the held-out text, over the whole stage
STORE_AFTER = 120.0  # seconds without a stored state
LARGEST_NORM = 1.0  # of the gradient of an update; a longer one is shortened
APART = 1.0  # nats a token above the best look from which on the learning has diverged
BETAS = (0.9, 0.999)


class Restoring:
    """The stage, from the journal of a first quantization to adapters.

    Args:
        source: the float model.
        job: of the whole run.
        assignment: the storage of every matrix in the first quantization.
        journal: of the run; ``first`` of it holds the first quantization.
        lessons: what to learn from.
        options: device and the like.
    """

    def __init__(
        self,
        source: SourceModel,
        job: Job,
        assignment: Assignment,
        journal: Journal,
        lessons: Lessons,
        options: RunOptions,
    ) -> None:
        self.source, self.job, self.assignment = source, job, assignment
        self.journal, self.lessons, self.options = journal, lessons, options
        self.config = RestoreConfig(**job.recipe["restore"])
        self.seed = int(job.recipe.get("seed", 0))
        self._streams: list[Stream] = []
        self._began = time.monotonic()

    def merged(self, targets: Targets) -> tuple[SourceModel, dict[str, Any]]:
        """The restored model, all of it in memory, and what is to be said of how it came about.

        Raises:
            InputError: peft refuses the adapters.
            BitfloorError: the run failed; the journal keeps what was finished.
        """
        student = self._first()
        adapters = Adapters(student.skeleton, targets.refs, self.config.choice, self.seed)
        if self.journal.facts(ADAPTERS) is None:
            try:
                with _checkpointed(student):
                    self.journal.put(ADAPTERS, self._learn(student.skeleton, adapters))
            finally:
                for stream in self._streams:
                    stream.close()
                self.source.release_outer()
        entry = self.journal.get(ADAPTERS)
        adapters.load(self._moved(entry.tensors))
        adapters.merge()
        return student, entry.facts

    def _first(self) -> SourceModel:
        """The first quantization, dense and whole, in a skeleton of its own."""
        self._tell("restoring: the quantized model, dense")
        own, device = self.source.again(), self.options.device
        own.load_outer(device)
        first = self.journal.first
        for k in range(own.map.n_blocks):
            own.load_block(k, device)
            entry = first.get(part_name(k))
            for name, layout in entry.facts["layouts"].items():
                order = entry.facts.get("orders", {}).get(name)
                weight = dequantize(native.decode(name, layout, entry.tensors.__getitem__, order))
                ref = self.assignment.refs[name]
                param = own.skeleton.get_parameter(ref.param).data
                part = param if ref.index is None else param[ref.index]
                part.copy_(weight.t() if ref.transposed else weight)
            trim_heap()
        entry = first.get(ENDS)
        for ends in (own.map.embedding, own.map.head):
            if ends is not None and ends.name in entry.facts["layouts"]:
                decode_table(entry, ends.name, own.skeleton.get_parameter(ends.param).data)
        return own

    # -- learning ----------------------------------------------------------------------------------------------------

    def _learn(self, model: nn.Module, adapters: Adapters) -> Entry:
        teacher = self._teacher() if self.config.objective == "distill" else None
        judge = Judge(model, self.job.products, teacher)
        adam = AdamW(betas=BETAS)
        begun = self._resumed(adapters, adam)
        if begun is None:
            best = {name: value.detach().clone() for name, value in adapters.parameters.items()}
            before = self._judged(judge, adapters)
            progress: dict[str, Any] = {"before": before, "after": before, "step": 0, "done": 0, "note": None}
        else:
            progress, best = begun
            self._tell(f"restoring: going on from update {progress['done']}")
        if not math.isfinite(progress["before"]):
            progress["note"] = "nothing was restored: the loss of the quantized model is not finite"
        else:
            for name, value in adapters.parameters.items():
                adam.moments.setdefault(name, torch.zeros(2, *value.shape, device=value.device))
            best = self._updates(judge, adapters, adam, progress, best)
        if progress["note"]:
            self._tell(progress["note"], kind="note")
        return Entry({name: value.cpu() for name, value in best.items()}, progress)

    def _updates(
        self,
        judge: Judge,
        adapters: Adapters,
        adam: AdamW,
        progress: dict[str, Any],
        best: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """All updates that are left; the best parameters. ``progress`` is kept up to date."""
        total = self.config.updates
        every = max(1, -(-total // LOOKS))
        stored = time.monotonic()
        for t in range(progress["done"], total):
            if not self._update(judge, adapters, adam, t):
                progress["note"] = (
                    f"restoring met a loss that is not finite; {progress['step']} of {t} updates are kept"
                )
                return best
            progress["done"] = t + 1
            look = (t + 1) % every == 0 or t + 1 == total
            if look:
                now = self._judged(judge, adapters)
                if now < progress["after"]:
                    progress |= {"after": now, "step": t + 1}
                    best = {name: value.detach().clone() for name, value in adapters.parameters.items()}
                before = progress["before"]
                self._tell(f"restoring: update {t + 1} of {total}, held-out loss {now:.4g} ({before:.4g} before)")
                if not now < progress["after"] + APART:
                    progress["note"] = f"restoring diverged; {progress['step']} of {t + 1} updates are kept"
                    return best
            if t + 1 < total and (look or time.monotonic() - stored > STORE_AFTER):
                self._store(adapters, adam, best, progress)
                stored = time.monotonic()
        return best

    def _update(self, judge: Judge, adapters: Adapters, adam: AdamW, t: int) -> bool:
        """One update from ``accumulation`` batches; False, and nothing moved, where its loss is not finite."""
        config = self.config
        for parameter in adapters.parameters.values():
            # Kept from update to update: made anew on the way back, it would lie between what is freed there.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        adapters.train(True)
        devices = [torch.device(self.options.device)] if self.options.device != "cpu" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            # Dropout's own numbers for every update: those of one that is repeated are the same.
            torch.manual_seed((self.seed * 1_000_003 + t + 1) % (1 << 63))
            for j in range(config.accumulation):
                rows = [
                    self._drawn((t * config.accumulation + j) * config.batch_size + i) for i in range(config.batch_size)
                ]
                loss = judge.loss(self.lessons.train[rows], rows)
                if not math.isfinite(float(loss.detach())):
                    return False
                (loss / config.accumulation).backward()  # type: ignore[no-untyped-call]
        trim_heap()
        norm = float(nn.utils.clip_grad_norm_(adapters.parameters.values(), LARGEST_NORM))
        if not math.isfinite(norm):
            return False
        for name, parameter in adapters.parameters.items():
            if parameter.grad is not None:
                adam.step(name, parameter.data, parameter.grad, rate_of(config, t), t + 1)
        return True

    def _drawn(self, n: int) -> int:
        """The ``n``-th sequence to learn from: all in random order, then again in another."""
        turn, at = divmod(n, self.config.distinct)
        generator = torch.Generator().manual_seed(self.seed + turn)
        return int(torch.randperm(self.config.distinct, generator=generator)[at])

    @torch.no_grad()
    def _judged(self, judge: Judge, adapters: Adapters) -> float:
        """Mean loss over the held-out sequences."""
        adapters.train(False)
        count, held = len(self.lessons.train), self.lessons.held
        return sum(float(judge.loss(held[i : i + 1], [count + i])) for i in range(len(held))) / len(held)

    @torch.no_grad()
    def _teacher(self) -> Teacher:
        """The float model's last hidden states of every sequence, those held out behind the others."""
        self._tell("restoring: the float model's last hidden states")
        source, device = self.source, self.options.device
        rows = [row[None].to(device) for row in (*self.lessons.train, *self.lessons.held)]
        source.load_outer(device)
        folder = self.options.spill
        stream = Stream(folder=None if folder is None else folder / "teacher")
        self._streams.append(stream)
        last_states(source, rows, stream, self.job.products, device)
        head = Head(source, self.job.products, as_tuple=gives_tuple(source, rows[0], device))
        return Teacher(head, stream)

    # -- resuming ----------------------------------------------------------------------------------------------------

    def _store(self, adapters: Adapters, adam: AdamW, best: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        tensors = {f"now.{name}": value.detach() for name, value in adapters.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        tensors |= {f"moments.{name}": value for name, value in adam.moments.items()}
        self.journal.put(RESTORING, Entry({name: value.cpu() for name, value in tensors.items()}, dict(progress)))

    def _resumed(self, adapters: Adapters, adam: AdamW) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Progress and best parameters of a run that was interrupted; its state is put back."""
        if self.journal.facts(RESTORING) is None:
            return None
        entry = self.journal.get(RESTORING)

        def of(kind: str) -> dict[str, Tensor]:
            return self._moved({n.removeprefix(kind): v for n, v in entry.tensors.items() if n.startswith(kind)})

        adapters.load(of("now."))
        adam.moments = of("moments.")
        return dict(entry.facts), of("best.")

    def _moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.options.device) for name, value in tensors.items()}

    def _tell(self, message: str, kind: str = "stage") -> None:
        seconds = time.monotonic() - self._began
        self.options.progress(Event(kind, blocks=self.source.map.n_blocks, seconds=seconds, message=message))


class Teacher:
    """The float model's distribution of the next token.

    Args:
        head: final norm and head of the float model.
        hidden: its last hidden states, one sequence each.
    """

    def __init__(self, head: Head, hidden: Stream) -> None:
        self.head, self.hidden = head, hidden

    def log_probabilities(self, ids: Tensor, which: int) -> Tensor:
        """``[1, T, V]`` of one sequence ``ids [1, T]``, which is number ``which``."""
        hidden = self.hidden[which].to(ids.device)
        return self.head.logits(ids, hidden, {}).log_softmax(-1)


class Judge:
    """The loss of a model on sequences.

    Args:
        model: whole.
        products: type of its products.
        teacher: whose distribution is aimed at; None for the next token itself.
    """

    def __init__(self, model: nn.Module, products: torch.dtype, teacher: Teacher | None) -> None:
        self.model, self.products, self.teacher = model, products, teacher
        self.device = next(model.parameters()).device

    def loss(self, ids: Tensor, which: Sequence[int]) -> Tensor:
        """Nats a token, mean over ``ids [B, T]``, which are the sequences ``which``."""
        ids = ids.to(self.device)
        with torch.autocast(ids.device.type, self.products, enabled=self.products is not torch.float32):
            logits = self.model(input_ids=ids, use_cache=False).logits
        if self.teacher is None:
            return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        losses = []
        for i, own in enumerate(which):
            with torch.no_grad():
                aim = self.teacher.log_probabilities(ids[i : i + 1], own)
            found = logits[i : i + 1].float().log_softmax(-1)
            losses.append((aim.exp() * (aim - found)).sum() / ids.numel())
        return torch.stack(losses).sum()


def rate_of(config: RestoreConfig, t: int) -> float:
    """The step of update ``t``: rises linearly over the warm-up, then falls along a half cosine to zero."""
    warm = round(config.warmup * config.updates)
    if t < warm:
        return config.rate * (t + 1) / warm
    done = (t - warm) / max(1, config.updates - warm)
    return config.rate * 0.5 * (1.0 + math.cos(math.pi * done))


@contextmanager
def _checkpointed(source: SourceModel) -> Iterator[None]:
    """Every block of the model keeps what enters it and nothing else, and is computed again on the way back."""
    blocks = list(source.skeleton.get_submodule(source.map.blocks_path).children())
    try:
        for block in blocks:
            block.forward = partial(_again, block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    found = checkpoint(forward, *args, use_reentrant=False, **kwargs)
    trim_heap()  # what is kept lies between what was freed
    return found

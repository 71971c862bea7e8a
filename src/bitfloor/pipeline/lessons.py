"""What the restoration learns from: how to, and which sequences of which text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef
from bitfloor.data.sources import TextSource
from bitfloor.data.tokenize import Tokenizer, token_sha256
from bitfloor.modeling.adapters import AdapterChoice
from bitfloor.pipeline.job import Assignment, Job

EVERY = "*"  # the glob that also matches what cannot be adapted
# Output projections of attention, by the names that models give them: what the published runs put no adapter on.
OUTPUT_PROJECTIONS = ("*.o_proj", "*.out_proj", "*attn.c_proj", "*attention.dense", "*.wo")
SEEN = 32  # tokens in a row by which a sequence is recognised as one of the calibration's
ON_EXPERTS = "experts are stacked in one parameter, which takes no adapter"


@dataclass(frozen=True)
class RestoreConfig:
    """How to restore; docs/methods/restoration.md has the meaning of each."""

    objective: str = "next-token"
    tokens: int = 131_072
    passes: int = 1
    text: str | None = None
    mode: str | None = None
    held_out: float = 0.05
    seqlen: int = 512
    batch_size: int = 1
    accumulation: int = 2
    rate: float = 1e-4
    warmup: float = 0.1
    adapter: str = "lora"
    rank: int | None = 64
    alpha: float | None = 16.0
    dropout: float | None = 0.1
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Sequence[str] = (EVERY,)
    leave: Sequence[str] | None = None

    @property
    def choice(self) -> AdapterChoice:
        """The adapter."""
        return AdapterChoice(self.adapter, self.rank, self.alpha, self.dropout, self.options)

    @property
    def updates(self) -> int:
        """Updates: whole ones only."""
        return self.tokens // (self.seqlen * self.batch_size * self.accumulation)

    @property
    def sequences(self) -> int:
        """Sequences that are learnt from, those of later passes included."""
        return self.updates * self.batch_size * self.accumulation

    @property
    def distinct(self) -> int:
        """Different ones among them."""
        return -(-self.sequences // self.passes)

    @property
    def judged(self) -> int:
        """Sequences that are held out, beside those."""
        return max(1, round(self.held_out * self.distinct))


def restore_config(job: Job) -> RestoreConfig | None:
    """How a job restores, None if it does not.

    Raises:
        InputError: fewer tokens than one update needs.
    """
    part = job.recipe.get("restore")
    if not part:
        return None
    config = RestoreConfig(**part)
    if config.updates < 1:
        raise InputError(
            f"restore.tokens = {config.tokens:,} is less than one update reads, which is restore.accumulation = "
            f"{config.accumulation} batches of restore.batch_size = {config.batch_size} sequences of restore.seqlen = "
            f"{config.seqlen:,} tokens; use more tokens, or smaller ones of these."
        )
    return config


@dataclass(frozen=True)
class Targets:
    """Matrices with adapters, and of those that were asked for in general the ones without, with the reason."""

    refs: tuple[MatrixRef, ...]
    left: Mapping[str, str]


def find_targets(config: RestoreConfig, assignment: Assignment) -> Targets:
    """The matrices to adapt.

    Raises:
        InputError: a glob that matches nothing, one that asks for experts, or nothing left.
    """
    matrices = {name: ref for name, ref in assignment.refs.items() if ref.block >= 0}
    leave = OUTPUT_PROJECTIONS if config.leave is None else config.leave
    for key, globs in (("targets", config.targets), ("leave", config.leave or ())):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in matrices):
                close = difflib.get_close_matches(glob, matrices, n=1, cutoff=0.0)
                hint = f" (the closest is {close[0]})" if close else ""
                raise InputError(
                    f"restore.{key} has {glob!r}, which matches none of the model's {len(matrices)} matrices{hint}; "
                    "correct the glob or remove it."
                )
    refs, left = [], {}
    for name, ref in matrices.items():
        asked = [glob for glob in config.targets if fnmatchcase(name, glob)]
        if not asked or any(fnmatchcase(name, glob) for glob in leave):
            continue
        if ref.kind == "expert":
            if set(asked) - {EVERY}:
                raise InputError(
                    f"restore.targets has {asked[-1]!r}, which asks for {name}, and {ON_EXPERTS}; name other matrices."
                )
            left[name] = ON_EXPERTS
        elif name in assignment.kept:
            left[name] = "the recipe keeps it"
        else:
            refs.append(ref)
    if not refs:
        why = f" ({next(iter(left))}: {next(iter(left.values()))})" if left else ""
        if not left and config.leave is None:
            why = " (output projections of attention are left out unless restore.leave says otherwise, as [] does)"
        raise InputError(f"restore.targets leaves no matrix to adapt{why}; name others, or leave restore out.")
    return Targets(tuple(refs), left)


@dataclass(frozen=True)
class Lessons:
    """Token sequences to learn from and to judge by.

    Args:
        train: int64 ``[N, T]``.
        held: int64 ``[M, T]``, none of them in ``train``.
    """

    train: Tensor
    held: Tensor

    def sha256(self) -> str:
        """Hash of both."""
        return token_sha256([self.train, self.held])


def make_lessons(
    config: RestoreConfig,
    tokenizer: Tokenizer,
    source: TextSource,
    seen: Sequence[Tensor],
    *,
    min_chars: int,
    pack: bool | None,
) -> Lessons:
    """Cut a text into sequences, leave out those that calibrate, and hold out a share of the rest.

    Documents give their first ``seqlen`` tokens each, in order; a running text is cut into windows, of which evenly
    spread ones are taken.

    Args:
        config: how many of which length.
        tokenizer: of the model.
        source: the text.
        seen: the calibration's batches; no sequence may repeat a long stretch of them.
        min_chars: documents must be longer.
        pack: one running text; None leaves it to the source.

    Raises:
        InputError: too little text.
    """
    wanted = config.distinct + config.judged
    length = min([SEEN, config.seqlen, *(batch.shape[1] for batch in seen)])
    known = {run for batch in seen for row in batch.tolist() for run in _runs(row, length, 1)}
    packed = source.running if pack is None else pack
    rows, found, skipped = [], 0, 0
    for row in (_windows if packed else _starts)(tokenizer, source, config.seqlen, min_chars):
        if any(run in known for run in _runs(row, length, length)):
            skipped += 1
            continue
        found += 1
        rows.append(row)
        if not packed and found == wanted:
            break
    if found < wanted:
        beside = f" beside {skipped:,} that calibrate" if skipped else ""
        left = found - 1
        while left > 0 and left + max(1, round(config.held_out * left)) > found:
            left -= 1
        ways = ["name another text with restore.text", "ask for fewer tokens"]
        ways += [f"read it more than once (restore.passes={-(-config.sequences // left)})"] if left > 0 else []
        ways += [] if packed else ["read it as one running text (restore.mode=packed)"]
        raise InputError(
            f"{source.name} is too short for restore.tokens = {config.tokens:,}: {config.distinct:,} sequences of "
            f"{config.seqlen:,} tokens to learn from and {config.judged:,} to judge by are needed, and it has "
            f"{found:,}{beside}; {', '.join(ways[:-1])}, or {ways[-1]}."
        )
    tokens = torch.tensor([rows[k * found // wanted] for k in range(wanted)], dtype=torch.int64)
    held = [(2 * k + 1) * wanted // (2 * config.judged) for k in range(config.judged)]
    mask = torch.zeros(wanted, dtype=torch.bool)
    mask[held] = True
    return Lessons(tokens[~mask], tokens[mask])


def _runs(row: Sequence[int], length: int, step: int) -> Iterable[int]:
    """Hashes of stretches of a row."""
    return (hash(tuple(row[i : i + length])) for i in range(0, len(row) - length + 1, step))


def _starts(tokenizer: Tokenizer, source: TextSource, seqlen: int, min_chars: int) -> Iterable[list[int]]:
    for document in source.documents:
        if len(document) > min_chars:
            tokens = _encode(tokenizer, document)
            if len(tokens) >= seqlen:
                yield tokens[:seqlen]


def _windows(tokenizer: Tokenizer, source: TextSource, seqlen: int, _: int) -> Iterable[list[int]]:
    tokens: list[int] = []
    end = tokenizer.eos_token_id
    for document in source.documents:
        if not document:
            continue
        if tokens and end is not None and tokens[-1] != end:
            tokens.append(end)
        tokens.extend(_encode(tokenizer, document))
    return (tokens[start : start + seqlen] for start in range(0, len(tokens) - seqlen + 1, seqlen))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])

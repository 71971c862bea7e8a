"""Text to token batches: the sequences a method calibrates on, the windows a model is scored on.

No randomness anywhere: the same tokenizer and text give the same tokens, and ``token_sha256`` names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from bitfloor.core.errors import InputError
from bitfloor.data.sources import TextSource

MIN_CHARS = 1500
"""Documents must be longer than this to be calibrated on, so that none of the sequences is padding or boilerplate."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any:
        """``tokenizer(text)["input_ids"]`` is a list of token ids, with the special tokens the model expects."""


def calibration_batches(
    tokenizer: Tokenizer,
    source: TextSource,
    *,
    sequences: int,
    seqlen: int,
    batch_size: int,
    min_chars: int = MIN_CHARS,
    pack: bool | None = None,
) -> list[Tensor]:
    """The token sequences to calibrate on.

    Two modes. *Documents*: the first ``sequences`` documents longer than ``min_chars`` characters that have at least
    ``seqlen`` tokens, each cut to its first ``seqlen``. *Packed*: all documents, the end-of-sequence token between
    them, cut into windows of ``seqlen``; the windows taken are spread evenly over the text.

    Args:
        tokenizer: adds the special tokens its model expects.
        source: the text.
        sequences: how many, at least 1.
        seqlen: tokens in each, at least 1.
        batch_size: sequences in a batch; the last batch may have fewer.
        min_chars: for the documents mode; packing takes every document.
        pack: which mode; None leaves it to the source (a running text is packed, a list of documents is not).

    Returns:
        int64 tensors ``[B, T]`` with ``B <= batch_size`` and ``T = seqlen``.

    Raises:
        InputError: a count below 1, or too little text: what there is and what is needed is named.
    """
    for name, value in (("sequences", sequences), ("seqlen", seqlen), ("batch_size", batch_size)):
        _check_positive(name, value)
    packed = source.running if pack is None else pack
    if packed:
        rows = _packed_windows(tokenizer, source, sequences, seqlen)
    else:
        rows = _document_starts(tokenizer, source, sequences, seqlen, min_chars)
    tokens = torch.tensor(rows, dtype=torch.int64)
    return [tokens[start : start + batch_size] for start in range(0, sequences, batch_size)]


def evaluation_windows(tokenizer: Tokenizer, source: TextSource, *, windows: int | None, seqlen: int) -> Tensor:
    """The windows a perplexity is measured on: the text as one string, tokenised once, cut without overlap.

    Args:
        tokenizer: as above. One that adds a beginning-of-sequence token adds it once, before the whole text.
        source: the text; its documents are joined by its separator.
        windows: how many from the start of the text; fewer come back when the text ends before. None means all.
        seqlen: tokens in a window, at least 2 (the first one is not scored).

    Returns:
        int64 ``[W, T]``, ``1 <= W <= windows``; the remainder of the text is dropped.

    Raises:
        InputError: a count out of range, or a text shorter than one window.
    """
    if windows is not None:
        _check_positive("windows", windows)
    if seqlen < 2:
        raise InputError(f"seqlen = {seqlen} leaves no token to score; use at least 2.")
    tokens = _encode(tokenizer, source.text)
    count = len(tokens) // seqlen if windows is None else min(windows, len(tokens) // seqlen)
    if count < 1:
        raise InputError(
            f"{source.name} has {len(tokens):,} tokens and one window needs {seqlen:,}; "
            "give more text or a smaller seqlen."
        )
    return torch.tensor(tokens[: count * seqlen], dtype=torch.int64).view(count, seqlen)


def token_sha256(batches: Tensor | Iterable[Tensor]) -> str:
    """Hash of token ids and their cut into sequences; how they are batched does not matter.

    Args:
        batches: integer tensors ``[B, T]``, one or several.
    """
    digest = hashlib.sha256()
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        for row in batch.to("cpu", torch.int64):
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _document_starts(
    tokenizer: Tokenizer, source: TextSource, sequences: int, seqlen: int, min_chars: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    long_enough = longest = 0
    for document in source.documents:
        if len(document) <= min_chars:
            continue
        long_enough += 1
        tokens = _encode(tokenizer, document)
        longest = max(longest, len(tokens))
        if len(tokens) >= seqlen:
            rows.append(tokens[:seqlen])
            if len(rows) == sequences:
                return rows
    raise InputError(
        f"{source.name} is too short: {sequences:,} sequences of {seqlen:,} tokens are needed, and of its "
        f"{len(source.documents):,} documents {long_enough:,} are longer than {min_chars:,} characters, of which "
        f"{len(rows):,} have {seqlen:,} tokens (the longest has {longest:,}); give more text, ask for fewer or shorter "
        "sequences, or add FILE:whole if it is one running text."
    )


def _packed_windows(tokenizer: Tokenizer, source: TextSource, sequences: int, seqlen: int) -> list[list[int]]:
    tokens: list[int] = []
    end = tokenizer.eos_token_id
    for document in source.documents:
        if not document:
            continue
        if tokens and end is not None and tokens[-1] != end:
            tokens.append(end)
        tokens.extend(_encode(tokenizer, document))
    there = len(tokens) // seqlen
    if there < sequences:
        raise InputError(
            f"{source.name} is too short: {sequences:,} sequences of {seqlen:,} tokens need {sequences * seqlen:,} "
            f"tokens, and it has {len(tokens):,}; give more text or ask for fewer or shorter sequences."
        )
    starts = [(k * there // sequences) * seqlen for k in range(sequences)]
    return [tokens[start : start + seqlen] for start in starts]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is expected here, and cut into windows afterwards.
    return list(tokenizer(text, verbose=False)["input_ids"])


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} = {value} is not a count; use at least 1.")

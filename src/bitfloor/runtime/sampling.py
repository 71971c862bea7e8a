"""The next token from logits: greedy, or drawn with a temperature from the most likely tokens, by a generator of its
own."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfloor.core.errors import BitfloorError, InputError

LIKELY = 256  # tokens that are sorted first; their sum is nearly always enough for top_p
SEEDS = 1 << 63  # seeds below this one


def fresh_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(SEEDS)


@dataclass(frozen=True)
class Settings:
    """How one text is made.

    Args:
        max_new_tokens: at least 1; None for as many as the context holds.
        temperature: 0 for greedy.
        top_p: draw from the most likely tokens that together have this probability, above 0 and up to 1.
        seed: of the draws, 0 or more and below 2^63.
        stop: strings that end the text; they are not part of it.

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int | None = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens = {self.max_new_tokens} makes no text; use at least 1.")
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature = {self.temperature} is no temperature; use 0 for greedy, or a positive number."
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p = {self.top_p} is no probability to draw from; use more than 0 and at most 1.")
        if not 0 <= self.seed < SEEDS:
            raise InputError(f"seed = {self.seed} is out of range; use 0 or more, below 2^63.")
        if "" in self.stop:
            raise InputError("an empty stop string would end every text at once; leave it out.")


class Sampler:
    """Chooses token after token of one text.

    Args:
        settings: temperature, top_p and seed are read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token.

        Args:
            logits: float32 ``[V]``; ``-inf`` is a token that cannot come.

        Raises:
            BitfloorError: they are not finite; greedy decoding would silently turn NaN into some token.
        """
        highest = logits.amax()
        if not torch.isfinite(highest):
            raise BitfloorError("The model gives NaN or infinite logits; its weights are damaged.")
        if self._settings.temperature == 0.0:
            return int(logits.argmax())
        # In float64, where a tiny temperature is not zero yet; on the CPU, where a seed always draws the same numbers.
        scores = (logits - highest).cpu().double() / self._settings.temperature
        chances = torch.softmax(scores, dim=-1)
        if self._settings.top_p == 1.0:
            return int(torch.multinomial(chances, 1, generator=self._generator))
        likely, tokens = self._nucleus(chances)
        return int(tokens[torch.multinomial(likely, 1, generator=self._generator)])

    def _nucleus(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        """The fewest tokens whose chances reach top_p, and those chances, the most likely first."""
        likely, tokens = torch.topk(chances, min(LIKELY, len(chances)))
        if float(likely.sum()) < self._settings.top_p:
            likely, tokens = torch.sort(chances, descending=True)
        before = likely.cumsum(0) - likely
        count = max(1, int((before < self._settings.top_p).sum()))
        return likely[:count], tokens[:count]

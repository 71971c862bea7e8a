"""Tokens a second of a packed model on the CPU, beside a plain read of memory and the same model in half precision.

Whatever is compared takes turns, round by round, and the best of each is kept: other programs only ever slow a run.
A decoding step reads every weight of the model once, so tokens a second times the bytes of the weights are compared
with what a plain read loop reaches on as many threads.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfloor.core.errors import InputError
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.modeling.context import context_length, text_config
from bitfloor.modeling.loader import open_source
from bitfloor.modeling.skeleton import build_skeleton
from bitfloor.ops import packed_native
from bitfloor.ops.backend import AUTO, INT8, REFERENCE, choosing, of_process
from bitfloor.runtime.decode import Decoder, TransformersDecoder, open_decoder
from bitfloor.runtime.kernel_speed import ReadLoop, Say
from bitfloor.runtime.linear import PackedEmbedding, PackedMatrix, TiedHead
from bitfloor.runtime.load import load_model

HALF_TYPES = (torch.bfloat16, torch.float16)
HALF_BYTES = 2
ROOM = 1.1  # of the half-precision weights: what loading and running them takes beside them
WARM_UP = 8  # tokens that are read, and two steps, before anything is timed
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configurations call them


@dataclass(frozen=True)
class SpeedOptions:
    """How much is measured.

    Args:
        prompt_tokens: read at once; fewer where the model's context is shorter.
        new_tokens: read one by one behind them.
        rounds: of which the best counts.
        threads: None for as many as torch uses.
        baseline: float model to compare with; None for random weights of the same shape.
        memory: bytes that this process may hold, None if not known.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    rounds: int = 3
    threads: int | None = None
    baseline: str | None = None
    memory: int | None = None

    def fitted(self, context: int | None) -> tuple[int, int]:
        """``(prompt, new)`` tokens that fit in a context.

        Raises:
            InputError: fewer than one of each was asked for, or the context holds fewer than two tokens.
        """
        if min(self.prompt_tokens, self.new_tokens, self.rounds) < 1 or (self.threads or 1) < 1:
            raise InputError("tokens, rounds and threads of a measurement are 1 or more each.")
        if context is None:
            return self.prompt_tokens, self.new_tokens
        if context < 2:
            raise InputError(f"a context of {context} tokens holds no prompt and a token behind it.")
        new = min(self.new_tokens, context // 2)
        return min(self.prompt_tokens, context - new), new


@dataclass
class Contestant:
    """A model that takes its turns.

    Args:
        name: ``"float"``, ``"int8"`` (activations of the packed model) or ``"half"``.
        decoder: an empty sequence over it.
        within: makes what it runs inside.
        weights: bytes of its weights; ``per_token`` of them are read at a step.
        dtype: of its activations.
        prefill, decode: seconds of every round.
    """

    name: str
    decoder: Decoder
    within: Callable[[], AbstractContextManager[None]]
    weights: int
    per_token: int
    dtype: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def run(self, prompt: Sequence[int], new: Sequence[int]) -> None:
        """One round."""
        with self.within():
            self.decoder.truncate(0)
            began = time.perf_counter()
            self.decoder.prefill(prompt)
            read = time.perf_counter()
            for token in new:
                self.decoder.step(token)
            ended = time.perf_counter()
        self.prefill.append(read - began)
        self.decode.append(ended - read)


def bench_model(folder: Path, options: SpeedOptions, say: Say) -> dict[str, Any]:
    """Measure a packed model; the document of ``bitfloor bench DIR --json``.

    Args:
        folder: a bitfloor checkpoint.
        options: how much.
        say: is told what is being done.

    Raises:
        InputError: not a bitfloor checkpoint, or options that make no sense.
    """
    options.fitted(None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(options.threads or before)
        return _bench_model(folder, options, say)
    finally:
        torch.set_num_threads(before)


def _bench_model(folder: Path, options: SpeedOptions, say: Say) -> dict[str, Any]:
    say(f"loading {folder.name}")
    read_checkpoint(folder)  # anything else is refused: its rows would not be of packed weights
    model = load_model(folder, dtype=torch.float32)
    prompt, new = options.fitted(context_length(model))
    length = prompt + new
    library, skipped = packed_native.load().library, {}
    contestants = [_packed(model, "float", length)]
    if reason := _no_int8():
        skipped["int8"] = reason
    else:
        contestants.append(_packed(model, "int8", length))
    half, reason = _half(model, options, say)
    if half is None:
        skipped["half"] = reason
    else:
        dtype = str(next(half.parameters()).dtype).removeprefix("torch.")
        decoder = TransformersDecoder(half, length)  # torch, whatever else could run it
        contestants.append(Contestant("half", decoder, nullcontext, *weight_bytes(half), dtype))
    tokens = _tokens(length, text_config(model).vocab_size)
    for contestant in contestants:
        say(f"warming up: {contestant.name}")
        contestant.run(tokens[: min(WARM_UP, prompt)], tokens[-min(2, new) :])
        contestant.prefill.clear()
        contestant.decode.clear()
    loop = None if library is None else ReadLoop(library)
    read = 0.0
    for number in range(options.rounds):
        read = max(read, 0.0 if loop is None else loop.best())
        for contestant in contestants:
            say(f"round {number + 1} of {options.rounds}: {contestant.name}")
            contestant.run(tokens[:prompt], tokens[prompt:])
    runs = [_result(contestant, prompt, new, read) for contestant in contestants]
    others = {run["name"]: run["decode_tokens_s"] for run in runs}
    for run in runs:
        run["times_half"] = run["decode_tokens_s"] / others["half"] if "half" in others else None
    return {
        "model": folder.resolve().name,
        "instruction_set": None if library is None else packed_native.LEVELS[library.level],
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "read_gb_s": read or None,
        "baseline": "random weights" if options.baseline is None else Path(options.baseline).name,
        "runs": runs,
        "skipped": skipped,
    }


def _packed(model: nn.Module, name: str, length: int) -> Contestant:
    chosen = INT8 if name == "int8" else REFERENCE if of_process() == REFERENCE else AUTO
    within = partial(choosing, chosen)
    with within():
        decoder = open_decoder(model, length)
    return Contestant(name, decoder, within, *weight_bytes(model), "float32")


def _no_int8() -> str:
    """Why the packed model is not measured with int8 activations; empty if it is."""
    if of_process() == REFERENCE:
        return "the reference was asked for, and it is measured alone"
    loaded = packed_native.load()
    return "" if loaded.library is not None else f"there are no packed kernels: {loaded.reason}"


def _half(model: Any, options: SpeedOptions, say: Say) -> tuple[Any, str]:
    """The model to compare with, or why there is none."""
    stored = getattr(model.config, "dtype", None)
    dtype = stored if stored in HALF_TYPES else torch.bfloat16
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if options.baseline is None:
        skeleton = build_skeleton(config)
        weights = sum(parameter.numel() for parameter in skeleton.parameters())
    else:
        skeleton = None
        weights = sum(prod(info.shape) for info in open_source(options.baseline).tensors.values())
    needed = int(ROOM * HALF_BYTES * weights) + sum(weight_bytes(model)[:1])
    if options.memory is not None and needed > options.memory:
        return None, (
            f"half precision and the packed model need {needed / 1e9:.1f} GB of memory and "
            f"{options.memory / 1e9:.1f} GB are available"
        )
    if skeleton is None:
        assert options.baseline is not None
        say(f"loading {Path(options.baseline).name} in half precision")
        return load_model(options.baseline, dtype=dtype), ""
    say("making a model of random half-precision weights")
    return fill_randomly(skeleton, dtype), ""


def fill_randomly(skeleton: Any, dtype: torch.dtype) -> Any:
    """Give a model on meta small random parameters of a type, on huge pages where the system can; shared ones stay so.

    One block of numbers is repeated: how long a product takes does not depend on them, as long as they are normal.
    """
    library = packed_native.load().library
    block = ((torch.rand(1 << 16, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.04).to(dtype)
    made: dict[int, nn.Parameter] = {}
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=dtype)
                if library is not None:
                    library.ask_for_huge_pages(values)
                for piece in values.view(-1).split(block.numel()):
                    piece.copy_(block[: piece.numel()])
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
    return skeleton


def weight_bytes(model: Any) -> tuple[int, int]:
    """``(bytes of all weights, bytes of them that a step of one token reads)``; shared ones once, keys and values not.

    A step reads one row of an embedding, unless the head is the same matrix, and as many experts as a token is sent to.
    """
    text = text_config(model)
    experts = next((int(getattr(text, name)) for name in EXPERTS if getattr(text, name, None)), 0)
    chosen = getattr(text, "num_experts_per_tok", None) or experts
    whole = read = 0
    for name, size, rows in _matrices(model):
        whole += size
        if rows:
            read += size // rows
        else:
            read += size * int(chosen) // experts if experts and ".experts." in f"{name}." else size
    return whole, read


def _matrices(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, bytes, and the number of rows if one of them is read, else 0, of all that is stored."""
    heads = {id(module._source[0]) for module in model.modules() if isinstance(module, TiedHead)}
    lookups = {id(module.weight): module.num_embeddings for module in model.modules() if type(module) is nn.Embedding}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            lookups.pop(id(module.weight), None)  # an embedding that is the head too
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedMatrix):
            size = sum(_size(module.get_buffer(part)) for part in module.part_names)
            looked_up = isinstance(module, PackedEmbedding) and id(module) not in heads
            yield name, size, module.shape[0] if looked_up else 0
        for own, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{own}", _size(parameter), lookups.get(id(parameter), 0)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tokens(count: int, vocabulary: int) -> list[int]:
    drawn = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(0))
    return [int(token) for token in drawn]


def _result(contestant: Contestant, prompt: int, new: int, read: float) -> dict[str, Any]:
    """One entry of ``runs``."""
    decode = new / min(contestant.decode)
    speed = decode * contestant.per_token / 1e9
    return {
        "name": contestant.name,
        "dtype": contestant.dtype,
        "decoder": type(contestant.decoder).__name__,
        "weight_bytes": contestant.weights,
        "bytes_per_token": contestant.per_token,
        "prefill_tokens_s": prompt / min(contestant.prefill),
        "decode_tokens_s": decode,
        "gb_s": speed,
        "share_of_read": speed / read if read else None,
    }

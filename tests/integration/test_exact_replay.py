"""A model run block by block from its files is the model itself, to the last bit, in every supported architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pico import CONFIGS, HYBRIDS, save_pico, token_batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import capture, run_tail
from bitfloor.calib.replay import verify_replay
from bitfloor.calib.streams import Stream
from bitfloor.core.errors import InputError
from bitfloor.modeling.loader import SourceModel, open_source


def reference_model(folder: Path) -> Any:
    """The model as transformers loads it, without its progress bar."""
    hf_logging.disable_progress_bar()
    # Experts one by one: the grouped product sums in another order, which is no business of the replay.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    for parameter in model.parameters():
        # transformers leaves weights where they lie in the mapped file, at any multiple of 8 bytes, and matrix products
        # of odd sizes sum in an order that depends on the alignment.
        parameter.data = parameter.data.clone()
    return model


def rounded(w: Tensor) -> Tensor:
    """Round-to-nearest at 3 bits, one scale for each row."""
    scale = w.abs().amax(dim=1, keepdim=True).clamp_min(1e-9) / 3.5
    return (w / scale).round().clamp(-4, 3) * scale


def replay(source: SourceModel, batches: list[Tensor], *, quantize: bool, spill: Path | None = None) -> list[Tensor]:
    """Logits of every batch, with one block in memory at a time."""
    path = source.map.blocks_path
    source.load_outer()
    stream = Stream(folder=spill)
    runs = capture(source.skeleton, path, batches, stream)
    for k in range(source.map.n_blocks):
        block = source.load_block(k)
        runner = BlockRunner(block, source.map.block_path(k), source.map.block_matrices(k), runs.calls[k])
        overrides = {n: rounded(runner.weight(n)) for n in runner.names} if quantize else None
        with torch.no_grad():
            for i in range(len(stream)):
                stream[i] = runner.forward(stream[i], i, overrides)
        source.release_block(k)
    return [run_tail(source.skeleton, path, b, stream[i]) for i, b in enumerate(batches)]


def quantize_in_place(model: nn.Module, source: SourceModel) -> None:
    with torch.no_grad():
        for ref in source.map.matrices:
            stored = model.get_parameter(ref.param)
            matrix = stored if ref.index is None else stored[ref.index]
            matrix = matrix.t() if ref.transposed else matrix
            matrix.copy_(rounded(matrix))


@pytest.mark.parametrize("name", [*sorted(CONFIGS), *sorted(HYBRIDS)])
def test_replay_is_exact(name: str, tmp_path: Path) -> None:
    source = open_source(save_pico(tmp_path / "model", name))
    # Two lengths, both beyond the sliding windows of 6, so masks differ between batches and between blocks.
    batches = [*token_batches(2), *token_batches(1, batch=1, tokens=17)]
    model = reference_model(source.path)
    with torch.no_grad():
        expected = [model(input_ids=b, use_cache=False).logits for b in batches]
        got = replay(source, batches, quantize=False, spill=tmp_path / "spill")
        for a, b in zip(got, expected, strict=True):
            assert float((a - b).abs().max()) == 0.0
        quantize_in_place(model, source)
        changed = [model(input_ids=b, use_cache=False).logits for b in batches]
        got = replay(source, batches, quantize=True)
    for a, b, float_logits in zip(got, changed, expected, strict=True):
        assert float((a - b).abs().max()) == 0.0
        assert float((a - float_logits).abs().max()) > 1e-3  # the quantized model is another model
    verify_replay(source, batches[0])
    assert all(p.is_meta for p in source.skeleton.parameters())


def test_a_model_with_a_memory_of_its_own_is_refused(tmp_path: Path) -> None:
    source = open_source(save_pico(tmp_path))
    runs: list[int] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        runs.append(1)
        return output + len(runs)

    # What a block keeps in itself between calls shows in no argument; only running both ways shows it.
    source.skeleton.model.layers[2].register_forward_hook(remember)
    with pytest.raises(InputError, match="LlamaForCausalLM run block by block differs from its own forward"):
        verify_replay(source, token_batches(1)[0])
    assert all(p.is_meta for p in source.skeleton.parameters())

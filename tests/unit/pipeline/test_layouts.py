"""Which matrices read one tensor, by name and shape, against what running the block says."""

from __future__ import annotations

import pytest
import torch
from pico import CONFIGS, pico_model, token_batches

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import capture
from bitfloor.core.spec import MatrixRef
from bitfloor.modeling.discover import describe
from bitfloor.pipeline.layouts import input_twins


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_names_and_shapes_tell_what_a_run_shows(name: str) -> None:
    model = pico_model(name).requires_grad_(False)
    parts = describe(model)
    seen = capture(model, parts.blocks_path, token_batches(1))
    for k in range(2):
        path, refs = parts.block_path(k), parts.block_matrices(k)
        runner = BlockRunner(model.get_submodule(path), path, refs, seen.calls[k])
        with torch.no_grad():
            groups = runner.input_groups(seen.hidden[0])
        first: dict[tuple[int, str], str] = {}
        expected = {}
        for index, group in enumerate(groups):
            for matrix in (ref.name for ref in refs if ref.name in group):
                module = matrix.rpartition(".")[0]
                if first.setdefault((index, module), matrix) != matrix:
                    expected[matrix] = first[index, module]
        assert input_twins(refs, {ref.name for ref in refs}) == expected
        if name == "llama":
            assert len(expected) == 3


def test_kept_matrices_are_no_twins_and_still_count() -> None:
    """Without the key and the value, the query must not be taken for a twin of the output projection."""
    shapes = {
        "attn.q": (8, 8),
        "attn.k": (4, 8),
        "attn.v": (4, 8),
        "attn.o": (8, 8),
        "mlp.a": (16, 8),
        "mlp.b": (8, 16),
    }
    refs = [MatrixRef(name, name, shape, 0, "linear") for name, shape in shapes.items()]
    assert input_twins(refs, shapes) == {"attn.k": "attn.q", "attn.v": "attn.q"}
    assert input_twins(refs, {"attn.k", "attn.v", "mlp.a"}) == {"attn.v": "attn.k"}
    assert input_twins(refs, {"attn.q", "attn.o"}) == {}
    assert input_twins(refs, set()) == {}

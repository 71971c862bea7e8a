"""The formula for PTQ1.61's bytes against what is packed, and sizes read from a file's header."""

from __future__ import annotations

from pathlib import Path

import pytest
import record
import shapes
import tables
import torch
from safetensors.torch import save_file

from bitfloor.core.affine import encode
from bitfloor.core.packed import bits_per_weight, nbytes
from bitfloor.core.spec import QuantSpec
from bitfloor.methods.options import Ptq161Config
from bitfloor.methods.ptq161 import Ptq161
from bitfloor.solvers.ranges import minmax_grid
from bitfloor.solvers.two_tier import LearnedScales


@pytest.mark.parametrize("rows, columns, multiple", [(40, 576, 32), (576, 192, 32), (48, 300, 16), (17, 70, 32)])
def test_the_formula_is_what_packing_takes(rows: int, columns: int, multiple: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    method = Ptq161(Ptq161Config(steps=0, multiple=multiple))
    (count, bits), (_, one) = method.tiers(columns)
    assert (count, bits, one) == (shapes.salient_channels(columns, multiple), 4, 1)
    order = torch.randperm(columns, generator=generator)
    salient, others = order[:count].sort().values, order[count:].sort().values
    part = weight.index_select(1, salient)
    grid = minmax_grid(part, QuantSpec(4, -1))
    packed = LearnedScales(weight, salient, others, encode(part, grid), grid, torch.float16).snapshot()
    found = packed.pack(torch.float16)
    assert shapes.formula(rows, columns, multiple) == sum(nbytes(found).values())
    assert 8 * shapes.formula(rows, columns, multiple) / rows / columns == pytest.approx(bits_per_weight(found))
    assert shapes.formula(rows, columns, multiple, order=False) == sum(nbytes(found).values()) - nbytes(found)["order"]


def test_whole_tiles_have_no_padding() -> None:
    """Codes of 4096 x 4096: four bits of 800 columns and one bit of the others, and nothing else."""
    side = 4096 * 2 * 3 + 4096 // 2 + 2 * 3296 + 2 * 4096
    assert shapes.formula(4096, 4096, 32) - side == 4096 * (4 * 800 + 3296) // 8
    assert shapes.formula(4096, 4096, 16) > shapes.formula(4096, 4096, 32) + 3 * 16 * 4096 // 8


def test_sizes_are_of_the_matrices_of_the_block(tmp_path: Path) -> None:
    names = {"mlp.up_proj.codes": 5, "mlp.up_proj.scale": 3, "input_layernorm.weight": 7}
    tensors = {f"model.layers.0.{name}": torch.zeros(size, dtype=torch.float16) for name, size in names.items()}
    save_file({**tensors, "model.norm.weight": torch.zeros(9)}, tmp_path / "a.safetensors", {"format": "pt"})
    save_file({"model.layers.0.mlp.down_proj.codes": torch.zeros(2)}, tmp_path / "b.safetensors")
    assert shapes.matrix_sizes(shapes.file_bytes(tmp_path)) == {"mlp.up_proj": 16, "mlp.down_proj": 8}


def test_the_tables_of_shapes() -> None:
    row = {"name": "a", "shape": [16, 64], "salient": 32, "file": 512, "plan": 512, "formula": 512}
    block = {"matrices": [row, {**row, "name": "b"}], "bits_per_linear_weight": 4.0}
    found = {"shapes": {"block": block, "shapes": shapes.other_shapes()}}
    assert tables.shapes(found).splitlines()[2:] == [
        "| a | 16 x 64 | 32 | 512 | 512 | 512 | 4.0000 |",
        "| b | 16 x 64 | 32 | 512 | 512 | 512 | 4.0000 |",
        "| the block | - | - | 1,024 | 1,024 | 1,024 | 4.0000 |",
    ]
    first = tables.multiples(found).splitlines()[2]
    assert first == "| 4096 x 4096 | 816 | 3,432,864 | 1.6369 | 800 | 3,367,360 | 1.6057 |"
    assert (record.ROOT / "docs/methods/ptq161.md").read_text("utf-8").count("<!-- table:shapes -->") == 1

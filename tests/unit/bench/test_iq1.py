"""The comparison with llama.cpp's smallest types: errors, what is looked at, what is read back, and its tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import iq1
import pytest
import tables
import torch
from packing import pack_model
from pico import pico_model


def test_the_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, off = (torch.randn(*shape, generator=generator) for shape in ((50, 12), (7, 12), (7, 12)))
    direct = (x @ (0.1 * off).T).square().sum() / (x @ weight.T).square().sum()
    assert iq1.error(weight, weight - 0.1 * off, x.T @ x) == pytest.approx(float(direct), rel=1e-4)
    assert iq1.error(weight, weight, x.T @ x) == 0.0


class Runner:
    """Shows what it is given as what enters the matrix."""

    def weight(self, name: str) -> torch.Tensor:
        return torch.ones(3, 5)

    def observe(self, xs: Any, fn: Callable[[str, torch.Tensor], None], names: list[str]) -> None:
        for x in xs:
            fn(names[0], x.reshape(-1, x.shape[-1]))


def test_importance_is_of_the_calibration_text_and_products_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, iq1.SEQLEN, 5, generator=generator) for _ in range(4)]
    for x in xs:
        x[:, 0] *= 100
    texts = {"calibration": range(2), "c4": range(2, 3), "wiki": range(3, 4)}
    moments, products = iq1.look(Runner(), "m", xs, texts)
    torch.testing.assert_close(moments, torch.cat(xs[:2]).reshape(-1, 5).square().mean(0))
    for index, text in ((2, "c4"), (3, "wiki")):
        every, behind = xs[index].reshape(-1, 5), xs[index][:, 1:].reshape(-1, 5)
        torch.testing.assert_close(products[text].every, every.T @ every, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(products[text].behind, behind.T @ behind, rtol=1e-4, atol=1e-2)


def test_a_checkpoint_is_read_as_it_is_stored(tmp_path: Path) -> None:
    model = pico_model("llama")
    name = "model.layers.1.mlp.down_proj"
    pack_model(model, tmp_path / "packed", lambda own, _: (3, 16) if own == name else None)
    weight = model.get_submodule(name).weight.detach()
    products = {text: iq1.Products(*(torch.eye(weight.shape[1]) for _ in range(2))) for text in iq1.TEXTS}
    matrix = iq1.Matrix(name, weight, torch.ones(weight.shape[1]), products, [])
    iq1.add_checkpoint([matrix], tmp_path / "packed")
    row = iq1.rows_of(matrix)[0]
    # Three bits in tiles of 16 x 32, a scale and a zero-point for 16 columns.
    high, wide = weight.shape
    tiles, groups = -(-wide // 32), -(-wide // 16)
    assert row["bytes"] == sum(row["parts"].values()) == high // 16 * (64 * 3 * tiles + 32 * groups + 6 * groups)
    assert row["name"] == "packed, whole model" and row["cpu_seconds"] is None
    assert 0.001 < row["error_c4"] == row["error_wiki_every_token"] < 0.1
    other = iq1.Matrix("model.layers.0.mlp.down_proj", weight, matrix.moments, products, [])
    with pytest.raises(SystemExit, match=r"layers\.0\.mlp\.down_proj is not quantized"):
        iq1.add_checkpoint([other], tmp_path / "packed")


def row(name: str, size: int, error: float, **parts: int) -> dict[str, Any]:
    errors = {"error_c4": error, "error_wiki": error / 2}
    return {"name": name, "bytes": size, "bits_per_weight": size / 64, "parts": parts, **errors}


def test_its_tables() -> None:
    def matrix(block: int, *rows: dict[str, Any]) -> dict[str, Any]:
        return {"name": f"model.layers.{block}.mlp.down_proj", "rows": list(rows)}

    ours = [row(f"PTQ1.61, {kind}", 1200, 0.5, codes=1000, scale=200) for kind in ("a", "b")]
    rows = (*ours, row("IQ1_S", 900, 0.25, blocks=900))
    found = {"iq1": {"matrices": [matrix(3, *rows), matrix(12, *rows)]}}
    assert tables.iq1(found).splitlines() == [
        "|  | bytes | bits a weight | block 3: C4 | WikiText-2 | block 12: C4 | WikiText-2 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| PTQ1.61, a | 1,200 | 18.7500 | 0.5000 | 0.2500 | 0.5000 | 0.2500 |",
        "| PTQ1.61, b | 1,200 | 18.7500 | 0.5000 | 0.2500 | 0.5000 | 0.2500 |",
        "| IQ1_S | 900 | 14.0625 | 0.2500 | 0.1250 | 0.2500 | 0.1250 |",
    ]
    assert tables.parts(found).splitlines() == [
        "|  | codes | scale | blocks | in all |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| PTQ1.61 | 1,000 | 200 | - | 1,200 |",
        "| IQ1_S | - | - | 900 | 900 |",
    ]
    found["iq1"]["matrices"].append(matrix(20, row("IQ1_S", 800, 0.1)))
    lines = tables.iq1(found).splitlines()
    assert (
        lines[4] == "| IQ1_S | 800 to 900 | 12.5000 to 14.0625 | 0.2500 | 0.1250 | 0.2500 | 0.1250 | 0.1000 | 0.0500 |"
    )
    assert lines[2].endswith("| 0.5000 | 0.2500 | - | - |")

"""A way to run commands in this process, and folders to run them on that need no torch to make."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bitfloor.cli.main import main
from bitfloor.core.headers import build_header, byte_count
from bitfloor.formats.layout import build_config


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def execute(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return execute


def layout(shape: tuple[int, int], kind: str, *segments: tuple[int, int, int]) -> dict[str, Any]:
    """A layout with packed zero-points; ``segments`` are (columns, bits, group size)."""
    return {
        "shape": list(shape),
        "kind": kind,
        "transposed": False,
        "scale_dtype": "float16",
        "segments": [
            {"columns": c, "bits": b, "group_size": g, "zero": "packed", "offset": False, "channel_scale": False}
            for c, b, g in segments
        ],
        "order": None,
    }


@dataclass(frozen=True)
class Folder:
    """A quantized folder of zeros."""

    path: Path
    report: dict[str, Any]

    def write_report(self, **changes: Any) -> None:
        (self.path / "bitfloor.json").write_text(json.dumps({**self.report, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Embedding at 8 bits, two linears of two blocks (one with two segments), one kept linear, one norm.

    Bytes by hand, with 16 rows and 32 columns a tile of 64 * bits bytes, 2 bytes a scale, 2 * bits bytes of zero-points
    for 16 rows: the embedding [32, 64] in groups of 64 takes 2*2*512 + 2*16*2 + 2*16 = 2144; a 2-bit [16, 64] in groups
    of 32 takes 2*128 + 2*32 + 2*4 = 328; 4 + 1 bits takes 256 + 64 + 2*32 + 8 + 2 = 394.
    """
    layouts = {
        "model.layers.10.up": layout((16, 64), "linear", (64, 2, 32)),
        "model.layers.2.up": layout((16, 64), "linear", (32, 4, 32), (32, 1, 32)),
        "model.embed": layout((32, 64), "embedding", (64, 8, 64)),
    }
    kept = {"model.layers.2.down.weight": ("F16", (64, 16)), "model.norm.weight": ("F16", (64,))}
    config = build_config(layouts, kept=kept, recipe={"name": "mine", "sha256": "0" * 64})
    tensors = dict(kept)
    for name in layouts:
        tensors.update({tensor: (dtype, shape) for tensor, dtype, shape in config.tensors_of(name)})
    data = b"\0" * sum(byte_count(dtype, shape) for dtype, shape in tensors.values())
    path = tmp_path / "quantized"
    path.mkdir()
    (path / "model.safetensors").write_bytes(build_header(tensors, {"format": "pt"}) + data)
    (path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "quantization_config": config.to_dict()})
    )
    report = {
        "recipe_name": "mine",
        "recipe": {"seed": 0, "spec": {"bits": 2, "group_size": 32}},
        "kept": {"model.layers.2.down": "the recipe keeps *.down"},
        "matrices": {"model.layers.2.up": {"block_error": 0.25, "output_error": 0.1, "note": None}},
        "made_from": {"model": "m", "recipe": "r"},
        "bytes": {"total": 5042, "linears": 328 + 394 + 2048, "embeddings": 2144, "other": 128},
    }
    made = Folder(path, report)
    made.write_report()
    return made

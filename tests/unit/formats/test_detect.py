"""What a path holds, and the sentence each wrong path gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packing import rtn

from bitfloor.core.errors import InputError
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.formats.detect import Found, Kind, detect
from bitfloor.formats.layout import build_config
from bitfloor.formats.native import encode, layout
from bitfloor.formats.shards import CheckpointWriter


def _config(folder: Path, **content: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model-00001-of-00002.safetensors").write_text("")
    block = {"quant_method": "bitfloor"}
    cases = {
        tmp_path / "none": Found(Kind.MISSING),
        tmp_path / "a.gguf": Found(Kind.GGUF, "a.gguf"),
        tmp_path / "a.txt": Found(Kind.FILE, "a.txt"),
        tmp_path / "empty": Found(Kind.EMPTY),
        tmp_path / "photos": Found(Kind.OTHER, "cat.png"),
        tmp_path / "half": Found(Kind.UNFINISHED),
        _config(tmp_path / "f", model_type="llama"): Found(Kind.FLOAT, "llama"),
        _config(tmp_path / "n", model_type="llama", quantization_config=block): Found(Kind.NATIVE),
        _config(tmp_path / "g", quantization_config={"quant_method": "gptq"}): Found(Kind.QUANTIZED, "gptq"),
        _config(tmp_path / "m", quantization={"bits": 4}, model_type="x"): Found(Kind.QUANTIZED, "mlx"),
        _config(tmp_path / "v", text_config={"quantization_config": {"quant_method": "awq"}}): Found(
            Kind.QUANTIZED, "awq"
        ),
        _config(tmp_path / "o", theme="dark"): Found(Kind.OTHER, "config.json"),
    }
    assert {path: detect(path) for path in cases} == cases


@pytest.mark.parametrize(("text", "message"), [("[1]", "no JSON table"), ("{", "not valid JSON")])
def test_a_broken_configuration_is_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        detect(tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weight = rtn(torch.randn(20, 50, generator=torch.Generator().manual_seed(0)), 3, 32)
    writer = CheckpointWriter(tmp_path / "model", 1500)
    for name in ("a", "b"):
        for tensor_name, tensor in encode(name, weight).items():
            writer.add_tensor(tensor_name, tensor)
    writer.add_tensor("norm", torch.zeros(3))
    writer.write()
    config = build_config({"a": layout(weight), "b": layout(weight)}, kept=["norm"])
    writer.finish({"model_type": "llama", "quantization_config": config.to_dict()})
    return tmp_path / "model"


def test_a_checkpoint_is_read_by_its_headers(checkpoint: Path) -> None:
    found = read_checkpoint(checkpoint)
    blocks, tiles, groups = 2, 2, 2
    assert found.matrix_bytes("a") == blocks * (tiles * 64 * 3 + groups * 32 + groups * 6)
    assert found.nbytes == 2 * found.matrix_bytes("a") + 12
    assert found.config["model_type"] == "llama" and list(found.native.matrices) == ["a", "b"]


def test_each_thing_missing_is_named(checkpoint: Path, tmp_path: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = checkpoint / content["weight_map"]["b.codes"]
    data = shard.read_bytes()
    shard.write_bytes(data[:-5])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_checkpoint(checkpoint)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing, although"):
        read_checkpoint(checkpoint)
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != shard.name}
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="'[ab].[a-z]+' is missing from the checkpoint"):
        read_checkpoint(checkpoint)
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        read_checkpoint(checkpoint)
    index.unlink()
    with pytest.raises(InputError, match="no weights"):
        read_checkpoint(checkpoint)
    with pytest.raises(InputError, match="does not exist"):
        read_checkpoint(tmp_path / "none")


def test_tensors_that_disagree_with_the_configuration_are_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["layouts"][0]["segments"][0]["bits"] = 4
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"a.codes.*is U8 \[2, 384\] and the configuration says U8 \[2, 512\]"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llama"}, "holds a float model"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by 'awq'"),
        ({"quantization_config": {"quant_method": "bitfloor", "format_version": 9}}, "format_version 9"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_checkpoint(_config(tmp_path / "m", **content))

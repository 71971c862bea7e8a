"""A damaged or foreign folder, given to what reads checkpoints: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packing import pack_model
from safetensors.torch import load_file, save_file
from trained import byte_tokenizer
from transformers import AutoModelForCausalLM

from bitfloor.cli.main import main
from bitfloor.core.headers import read_header

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama, everything but its norms packed."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    pack_model(model, folder, lambda name, kind: (8, 16) if kind == "embedding" else (4, 16))
    byte_tokenizer().save_pretrained(folder)
    return folder


def shard(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def truncate(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def flip(folder: Path) -> None:
    entry = next(e for name, e in read_header(shard(folder)).tensors.items() if name.endswith("q_proj.codes"))
    data = bytearray(shard(folder).read_bytes())
    data[entry.start + 17] ^= 0x10
    shard(folder).write_bytes(data)


def narrow(folder: Path) -> None:
    tensors = load_file(shard(folder))
    name = next(name for name in tensors if name.endswith("q_proj.codes"))
    save_file({**tensors, name: tensors[name][:, :-64].contiguous()}, shard(folder), {"format": "pt"})


def of(**values: Any) -> Damage:
    return lambda folder: edit(folder, lambda config: config.update(values))


def quantization(**values: Any) -> Damage:
    return lambda folder: edit(folder, lambda config: config["quantization_config"].update(values))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate, "truncated or damaged"),
    "flipped byte in codes": (flip, "its bytes are not those that were written"),
    "wrong shape": (narrow, "the configuration says"),
    "missing shard": (lambda folder: shard(folder).unlink(), "no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "other widths": (of(hidden_size=64, head_dim=8), "belongs to another model"),
    "fewer blocks": (of(num_hidden_layers=1), "no such module"),
    "another vocabulary": (of(vocab_size=300), "belongs to another model"),
    "another kept shape": (of(attention_bias=True), "belongs to another model"),
    "more blocks": (of(num_hidden_layers=4, layer_types=None), "belongs to another model"),
    "newer version": (quantization(format_version=2), "format_version 2"),
    "newer key": (quantization(lattices=[]), "unknown key 'lattices'"),
    "matrices of another type": (quantization(matrices=[1, 2]), "matrices = [1, 2]"),
    "another method": (of(quantization_config={"quant_method": "awq", "bits": 4}), "awq"),
    "another kind of model": (of(model_type="nothing-we-know"), "nothing-we-know"),
    "nested without end": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "nested too deeply"),
    "no such activation": (of(hidden_act="foo"), "foo"),
    "no such positions": (of(rope_parameters={"rope_type": "zz", "rope_theta": 1e4}), "zz"),
    "no end token": (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}'), "x"),
}
# These are in order for `inspect`, which builds no model.
OF_THE_MODEL = {"other widths", "fewer blocks", "more blocks", "another vocabulary", "another kept shape"}
OF_THE_MODEL |= {"another kind of model", "no such activation", "no such positions", "no end token"}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["generate", "inspect", "eval"])
def test_a_damaged_or_foreign_folder_gets_a_sentence(
    command: str, damage: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    change, message = DAMAGES[damage]
    change(folder)
    (tmp_path / "text.txt").write_text("once upon a time " * 40)
    arguments = {
        "generate": ["generate", str(folder), "once", "--max-new-tokens", "1"],
        "inspect": ["inspect", str(folder), "--verify"],
        "eval": ["eval", str(folder), "--perplexity", str(tmp_path / "text.txt"), "--windows", "1", "--seqlen", "32"],
    }[command]
    code = main(arguments)
    captured = capsys.readouterr()
    if (command == "inspect" and damage in OF_THE_MODEL) or (command == "eval" and damage == "no end token"):
        assert code == 0
        return
    last = captured.err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last, captured.err
    assert captured.out == "" and "unexpected" not in captured.err and captured.err.count("\n") == 1

"""Whatever is wrong with what was asked: one sentence, exit code 2, and no file in the output folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained import byte_tokenizer
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from bitfloor import api
from bitfloor.cli.main import main
from bitfloor.core.errors import InputError

Recipe = dict[str, Any]


@pytest.fixture
def model(pico: Callable[..., Path], tmp_path: Path) -> Path:
    """A pico Llama of its own in three shards, free to be damaged."""
    import transformers

    folder = tmp_path / "model"
    original = pico("llama")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(original)
    loaded.save_pretrained(folder, max_shard_size="150KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def refused(model: Path | str, out: Path, recipe: Any, **options: Any) -> str:
    """The sentence; nothing may have been written."""
    before = sorted(out.rglob("*")) if out.is_dir() else None
    with pytest.raises(InputError) as caught:
        api.quantize(model, out, recipe, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and message.endswith((".", ")"))
    assert (sorted(out.rglob("*")) if out.is_dir() else None) == before
    return message


def edit_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def edit_tensor(model: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(model / index[name])
    change(tensors[name])
    save_file(tensors, model / index[name], {"format": "pt"})


# -- the model -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(small: Recipe, tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(tmp_path / "nowhere", tmp_path / "out", small)


def test_a_file_that_is_no_model(small: Recipe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a .gguf file" in refused(tmp_path / "notes.txt", tmp_path / "out", small)
    (tmp_path / "model.gguf").write_text("hello")
    assert "GGUF mark" in refused(tmp_path / "model.gguf", tmp_path / "out", small)


def test_a_config_without_weights(model: Path, small: Recipe, tmp_path: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    assert "has a config.json but no weights" in refused(model, tmp_path / "out", small)


def test_a_truncated_shard(model: Path, small: Recipe, tmp_path: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused(model, tmp_path / "out", small)
    assert shard.name in message and "truncated" in message


@pytest.mark.parametrize("damage", ["length", "json", "offsets"])
def test_a_corrupt_shard(damage: str, model: Path, small: Recipe, tmp_path: Path) -> None:
    shard = sorted(model.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    if damage == "length":
        data[7] = 0x7F
    elif damage == "json":
        data[8] = ord("?")
    else:
        at = data.index(b'"data_offsets":[') + len(b'"data_offsets":[')
        data[at] = ord("1") if data[at] != ord("1") else ord("2")
    shard.write_bytes(data)
    message = refused(model, tmp_path / "out", small)
    assert shard.name in message and ("corrupt" in message or "truncated" in message)


def test_a_shard_that_the_index_names_and_one_that_it_does_not(model: Path, small: Recipe, tmp_path: Path) -> None:
    shards = sorted(model.glob("model-*.safetensors"))
    shutil.copy(shards[0], model / "model-00009-of-00009.safetensors")
    message = refused(model, tmp_path / "out", small)
    assert "model-00009-of-00009.safetensors is missing from model.safetensors.index.json" in message
    (model / "model-00009-of-00009.safetensors").unlink()
    shards[-1].unlink()
    assert f"names the shard {shards[-1].name}, which is not there" in refused(model, tmp_path / "out", small)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", float("nan")),
        ("model.layers.1.mlp.down_proj.weight", float("nan")),
        ("model.layers.2.input_layernorm.weight", float("inf")),
        ("lm_head.weight", float("-inf")),
    ],
)
def test_weights_that_are_not_numbers(name: str, value: float, model: Path, small: Recipe, tmp_path: Path) -> None:
    """Every weight is looked at before the first file is written, not when its block has its turn."""
    out = tmp_path / "out"
    edit_tensor(model, name, lambda tensor: tensor.view(-1)[7:8].fill_(value))
    assert f"the tensor {name} in " in (message := refused(model, out, small)) and "holds NaN or infinite" in message
    edit_tensor(model, name, lambda tensor: tensor.view(-1)[7:8].fill_(0.1))
    api.quantize(model, out, small)
    assert (out / "config.json").is_file()


def test_an_encoder(small: Recipe, tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    assert "BertForMaskedLM, not a causal language model" in refused(tmp_path / "model", tmp_path / "out", small)
    edit_config(tmp_path / "model", architectures=None)  # transformers would build a decoder from it without a word
    assert "is an encoder" in refused(tmp_path / "model", tmp_path / "out", small)


def test_an_encoder_and_decoder(small: Recipe, tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    assert "is an encoder-decoder model" in refused(tmp_path / "model", tmp_path / "out", small)


def test_a_model_that_is_already_quantized(model: Path, small: Recipe, tmp_path: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "awq", "bits": 4})
    assert "already quantized with awq" in refused(model, tmp_path / "out", small)


def test_our_own_output_as_input(model: Path, small: Recipe, tmp_path: Path) -> None:
    own = {**small, "method": {"name": "rtn", "range": "minmax"}}
    api.quantize(model, tmp_path / "first", own)
    assert "already quantized with bitfloor" in refused(tmp_path / "first", tmp_path / "second", own)


def test_a_hub_id_without_a_network(small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("Network is unreachable\nand a page of details")

    message = refused("somebody/some-model-that-is-not-here", tmp_path / "out", small)  # HF_HUB_OFFLINE is set
    assert "somebody/some-model-that-is-not-here is no local folder and cannot be fetched" in message
    monkeypatch.setattr("bitfloor.modeling.locate.snapshot_download", unreachable)
    message = refused("somebody/some-model", tmp_path / "out", small)
    assert "ConnectionError: Network is unreachable" in message and "check the name and the network" in message


# -- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("gptq-w3g63", (), "gptq-w3g64"),
        ("gptq-w3g64", ("spec.bit=3",), "did you mean spec.bits"),
        ("gptq-w3g64", ("colour=red",), "unknown key colour"),
        ("gptq-w3g64", ("bits=7",), "spec.bits = 7 is not allowed; use one of 1, 2, 3, 4, 5, 6, 8"),
        ("gptq-w3g64", ("bits=0",), "spec.bits = 0"),
        ("gptq-w3g64", ("group_size=0",), "spec.group_size = 0 is not allowed"),
        ("gptq-w3g64", ("embedding.bits=7",), "embedding.bits = 7"),
        ("gptq-w3g64", ("method.damp=1",), "did you mean method.damping"),
        ("gptq-w3g64", ("layers=[{match: '*.q_prj', bits: 4}]",), "matches none of the model's 21 matrices"),
        ("gptq-w3g64", ("bits",), "not of the form"),
    ],
)
def test_recipes(recipe: str, overrides: tuple[str, ...], message: str, pico: Any, tmp_path: Path) -> None:
    assert message in refused(pico("llama"), tmp_path / "out", recipe, overrides=overrides)


def test_a_tied_head_cannot_differ_from_its_embedding(pico: Any, small: Recipe, tmp_path: Path) -> None:
    message = refused(pico("llama_tied"), tmp_path / "out", {**small, "head": {"bits": 4}})
    assert "head.bits is 4 and embedding.bits is 8, but this model ties its head to its embedding" in message


# -- the text ------------------------------------------------------------------------------------------------------


def test_a_calibration_text_that_is_too_short(model: Path, small: Recipe, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 100)
    message = refused(model, tmp_path / "out", small, calibration=f"{text}:whole")
    assert "4 sequences of 32 tokens need 128 tokens, and it has 100" in message
    message = refused(model, tmp_path / "out", small, calibration=str(text))
    assert "of its 1 documents 0 are longer than 1,500 characters" in message


def test_a_calibration_text_that_is_not_there(model: Path, small: Recipe, tmp_path: Path) -> None:
    assert "nothing.txt" in refused(model, tmp_path / "out", small, calibration=str(tmp_path / "nothing.txt"))


def test_a_model_without_a_tokenizer(model: Path, small: Recipe, tmp_path: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "no usable tokenizer" in refused(model, tmp_path / "out", small)


# -- the output folder ---------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else(model: Path, small: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        assert "it holds 'thesis.tex'" in refused(model, out, small, resume=resume)
        assert (out / "thesis.tex").read_text() == "years of work"
    assert "is a file" in refused(model, out / "thesis.tex", small)


def test_the_model_itself_as_the_output(model: Path, small: Recipe) -> None:
    for resume in (True, False):
        assert "is not a bitfloor run" in refused(model, model, small, resume=resume)


@pytest.mark.parametrize("where", ["new", "there"])
def test_no_permission(where: str, model: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "closed" / "out"
    (out if where == "there" else out.parent).mkdir(parents=True)
    if os.getuid():
        (out if where == "there" else out.parent).chmod(0o500)
        assert "no permission to write" in refused(model, out, small)
        return
    real_mkdir, real_open = Path.mkdir, Path.open

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:  # to the superuser nothing is closed
        if where == "new" and out in (path, *path.parents):
            raise PermissionError(13, "Permission denied", str(path))
        real_mkdir(path, *args, **kwargs)

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode and out in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "open", opened)
    assert "no permission to write" in refused(model, out, small)


def test_a_device_that_is_not_there(model: Path, small: Recipe, tmp_path: Path) -> None:
    assert "use cpu or cuda" in refused(model, tmp_path / "out", small, device="abacus")


def test_a_run_that_does_not_fit_in_memory(
    model: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitfloor.pipeline.plan.available_memory", lambda device: 1 << 20)
    message = refused(model, tmp_path / "out", small)
    assert "GB of memory and 0.0 GB are available" in message and "--spill" in message
    with pytest.raises(InputError, match="GB of memory"):
        api.plan(model, small)


# -- through the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["missing", "bits", "occupied", "nan"])
def test_the_command_line_says_it_in_one_line(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(model), "--out", str(out), "--recipe", "rtn-minmax-w3g64"]
    if case == "missing":
        arguments[1] = str(tmp_path / "nowhere")
    elif case == "bits":
        arguments.append("bits=9")
    elif case == "occupied":
        out.mkdir()
        (out / "thesis.tex").touch()
    else:
        edit_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor[0, :1].fill_(float("nan")))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in captured.err and captured.out == ""
    word = {"missing": "nowhere", "bits": "9", "occupied": "thesis.tex", "nan": "model.layers.1.mlp.up_proj.weight"}
    assert word[case] in last
    assert captured.err.count("\n") == 1
    assert not (out / "config.json").exists()

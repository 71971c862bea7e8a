"""GGUF files become ordinary folders, once, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.modeling import gguf as module
from bitfloor.modeling.gguf import cache_root, gguf_to_folder
from bitfloor.modeling.loader import open_source

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, INNER, LAYERS = 32, 4, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", "!!", *(chr(c) for c in range(33, 94))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A two-block Llama in a GGUF file: Q8_0 for one matrix, float32 for the rest."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * len(TOKENS))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (len(TOKENS), HIDDEN),
    }
    for k in range(LAYERS):
        shapes |= {f"blk.{k}.attn_{x}.weight": (HIDDEN, HIDDEN) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{k}.ffn_{x}.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"blk.{k}.ffn_down.weight": (HIDDEN, INNER)}
        shapes |= {f"blk.{k}.{x}_norm.weight": (HIDDEN,) for x in ("attn", "ffn")}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if name == "blk.0.ffn_up.weight":
            packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


@pytest.mark.filterwarnings("ignore")  # what gguf and transformers warn about while reading is theirs
def test_a_gguf_model_opens_as_its_dequantized_weights(
    tiny: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, tensors = tiny
    state = torch.get_rng_state()
    source = open_source(path, cache_dir=tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert "it/s" not in capfd.readouterr().err  # no foreign progress bar
    assert source.map.n_blocks == LAYERS and not source.map.tied
    read = {
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "token_embd": "model.embed_tokens",
    }
    for name, target in read.items():
        assert torch.equal(source.read(f"{target}.weight"), tensors[f"{name}.weight"])
    assert source.tokenizer().convert_ids_to_tokens([1]) == ["<s>"]
    folder = source.path
    assert folder.parent == tmp_path / "gguf" and [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert json.loads((folder / "dequantized_from.json").read_text())["sha256"].startswith(folder.name)


def fake(calls: list[Path], fail: Exception | None = None) -> object:
    def dequantize(path: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        if fail is not None:
            raise fail

    return dequantize


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF and then some")
    return path


def test_the_folder_is_made_once_and_that_is_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(module, "_dequantize", fake(calls))
    first = gguf_to_folder(file, tmp_path / "c")
    assert gguf_to_folder(file, tmp_path / "c") == first and len(calls) == 1
    assert caplog.messages == [f"dequantizing {file.name}, once, into {first} (4 bytes a parameter)"]
    file.write_bytes(b"GGUF and something else")
    assert gguf_to_folder(file, tmp_path / "c") != first and len(calls) == 2


@pytest.mark.parametrize(
    "fail", [InputError("unknown kind"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Exception) -> None:
    monkeypatch.setattr(module, "_dequantize", fake([], fail))
    expected = BitfloorError if isinstance(fail, OSError) else type(fail)
    with pytest.raises(expected):
        gguf_to_folder(file, tmp_path / "c")
    assert list((tmp_path / "c" / "gguf").iterdir()) == []


def test_a_folder_without_its_mark_is_made_again(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_dequantize", fake(calls := []))
    folder = gguf_to_folder(file, tmp_path / "c")
    (folder / "dequantized_from.json").unlink()
    (folder / "old").write_text("x")
    assert gguf_to_folder(file, tmp_path / "c") == folder and len(calls) == 2
    assert not (folder / "old").exists()


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(InputError, match="does not exist"):
        open_source(path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="does not begin with the GGUF mark"):
        open_source(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="cannot be dequantized"):
        open_source(path, cache_dir=tmp_path)


def test_the_package_is_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_gguf_available", lambda: False)
    with pytest.raises(InputError, match="pip install gguf"):
        gguf_to_folder(file)


def test_a_cache_that_cannot_be_written(file: Path, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("in the way")
    with pytest.raises(BitfloorError, match="set BITFLOOR_CACHE"):
        gguf_to_folder(file, tmp_path / "c")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLOOR_CACHE", str(tmp_path))
    assert cache_root() == tmp_path / "gguf" and cache_root(tmp_path / "x") == tmp_path / "x" / "gguf"
    monkeypatch.delenv("BITFLOOR_CACHE")
    assert cache_root() == Path.home() / ".cache" / "bitfloor" / "gguf"

"""The source model: weights in, weights out, one block at a time; and a sentence for everything that can be wrong."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import pico_model, save_pico
from safetensors.torch import load_file, save_file

from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.modeling import loader
from bitfloor.modeling.loader import SourceModel, open_source


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("llama"))


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "falcon"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_blocks_hold_the_model_they_came_from(tmp_path: Path, name: str, shard: str) -> None:
    folder, reference = save_pico(tmp_path, name, shard=shard), pico_model(name)
    source = open_source(folder)
    source.load_outer()
    for k in range(source.map.n_blocks):
        block = source.load_block(k)
        assert block is source.skeleton.get_submodule(source.map.block_path(k))
        assert not any(p.requires_grad for p in block.parameters())
    state = source.skeleton.state_dict()
    for key, value in reference.state_dict().items():
        assert torch.equal(state[key], value), key


def test_released_blocks_are_on_meta_and_their_memory_is_gone(llama: Path) -> None:
    source = open_source(llama)
    assert all(p.is_meta for p in source.skeleton.parameters())
    block = source.load_block(1)
    assert not any(p.is_meta for p in block.parameters())
    assert all(p.is_meta for p in source.skeleton.model.layers[0].parameters())
    source.release_block(1)
    source.load_outer()
    source.release_outer()
    assert all(p.is_meta for p in source.skeleton.parameters())
    gc.collect()
    # Only buffers (rotary tables of 6 floats) may be left: no weight survives anywhere in the source.
    assert max(b.numel() for b in source.skeleton.buffers()) <= 16


def test_weights_are_float32_alone_and_aligned(tmp_path: Path) -> None:
    source = open_source(save_pico(tmp_path, "mixtral", dtype=torch.bfloat16))
    for parameter in source.load_block(0).parameters():
        assert parameter.dtype == torch.float32
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
        assert parameter.data_ptr() % 64 == 0
    assert source.load_block(0, dtype=torch.bfloat16).mlp.gate.weight.dtype == torch.bfloat16


def test_read_gives_stored_dtype_and_leaves_the_skeleton_alone(tmp_path: Path) -> None:
    source = open_source(save_pico(tmp_path, "llama", dtype=torch.bfloat16))
    name = "model.layers.2.mlp.down_proj.weight"
    stored = source.read(name)
    assert stored.dtype == torch.bfloat16 and source.read(name, torch.float32).dtype == torch.float32
    assert torch.equal(stored, load_file(tmp_path / "model.safetensors")[name])
    assert source.skeleton.get_parameter(name).is_meta
    with pytest.raises(BitfloorError, match="no_such is not a parameter"):
        source.read("no_such")


def test_tensor_table_names_files_and_targets(tmp_path: Path) -> None:
    source = open_source(save_pico(tmp_path, "mixtral"))
    info = source.tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    assert info.target == "model.layers.0.mlp.experts.gate_up_proj"
    assert info.file == tmp_path / "model.safetensors" and info.shape == (80, 48) and info.dtype == torch.float32


def test_global_random_state_is_untouched(llama: Path) -> None:
    before = torch.get_rng_state()
    source = open_source(llama)
    source.load_outer()
    source.load_block(0)
    assert torch.equal(before, torch.get_rng_state())


# -- ties ------------------------------------------------------------------------------------------------------------


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    source = open_source(save_pico(tmp_path, "llama_tied"))
    source.load_outer()
    model = source.skeleton
    assert (
        source.map.tied and model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta
    )
    assert torch.equal(source.read("lm_head.weight"), model.lm_head.weight)


def test_only_the_head_is_stored(tmp_path: Path) -> None:
    save_pico(tmp_path, "llama_tied")
    shared = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, **{"model.embed_tokens.weight": None, "lm_head.weight": shared})
    source = open_source(tmp_path)
    source.load_outer()
    assert source.map.tied and torch.equal(source.skeleton.model.embed_tokens.weight, shared)
    source.check_accounting([r.name for r in source.map.matrices], source.map.kept, ["lm_head"])


@pytest.mark.parametrize("equal", [True, False])
def test_both_ends_stored_although_tied(tmp_path: Path, equal: bool) -> None:
    save_pico(tmp_path, "llama_tied")
    shared = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, **{"lm_head.weight": shared.clone() if equal else shared + 1})
    source = open_source(tmp_path)
    source.load_outer()
    assert source.map.tied is equal and source.config.tie_word_embeddings is equal
    assert torch.equal(source.skeleton.lm_head.weight, shared if equal else shared + 1)
    assert torch.equal(source.skeleton.model.embed_tokens.weight, shared)


def test_an_untied_head_can_be_left_out(llama: Path) -> None:
    source = open_source(llama)
    source.load_outer(head=False)
    assert source.skeleton.lm_head.weight.is_meta and not source.skeleton.model.embed_tokens.weight.is_meta


# -- accounting and identity -----------------------------------------------------------------------------------------


def all_names(source: SourceModel) -> list[str]:
    assert source.map.embedding is not None
    return [source.map.embedding.name, *(r.name for r in source.map.matrices)]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "gpt2"])
def test_accounting_accepts_the_whole_model(tmp_path: Path, name: str) -> None:
    source = open_source(save_pico(tmp_path, name))
    head, embed = source.map.head, source.map.embedding
    assert head is not None and embed is not None
    tied = [head.name] if source.map.tied else []
    kept = [*source.map.kept, *([] if source.map.tied else [head.param])]
    source.check_accounting(all_names(source), kept, tied)
    source.check_accounting([r.name for r in source.map.matrices], [*kept, embed.param], tied)


def test_accounting_refuses_a_missing_a_double_and_a_partial_matrix(tmp_path: Path) -> None:
    source = open_source(save_pico(tmp_path, "mixtral"))
    names, kept = all_names(source), [*source.map.kept, "lm_head.weight"]
    with pytest.raises(BitfloorError, match="neither quantized nor kept"):
        source.check_accounting([n for n in names if "q_proj" not in n], kept)
    with pytest.raises(BitfloorError, match=r"self_attn\.q_proj.*twice"):
        source.check_accounting(names, [*kept, "model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(BitfloorError, match=r"w1.*neither"):
        source.check_accounting([n for n in names if not n.endswith("0.mlp.experts.2.gate_up_proj")], kept)
    with pytest.raises(BitfloorError, match="invented was quantized"):
        source.check_accounting([*names, "invented"], kept)
    with pytest.raises(BitfloorError, match=r"input_layernorm.*neither"):
        source.check_accounting(names, [k for k in kept if "0.input_layernorm" not in k])


def test_fingerprint_follows_the_content(llama: Path, tmp_path: Path) -> None:
    first = open_source(llama).fingerprint
    same = copy_of(llama, tmp_path / "same")
    assert open_source(same).fingerprint == first
    data = bytearray((same / "model.safetensors").read_bytes())
    data[-3] ^= 1  # the lowest bits of the last weight
    (same / "model.safetensors").write_bytes(data)
    assert open_source(same).fingerprint != first
    other = edit_config(copy_of(llama, tmp_path / "other"), rms_norm_eps=1e-3)
    assert open_source(other).fingerprint != first


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(source: Path | str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        open_source(source)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_missing_things(tmp_path: Path, llama: Path) -> None:
    refused(tmp_path / "nothing", "nothing", "does not exist")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "not valid JSON")
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    refused(tmp_path, "no weights")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "is a file, but not a .gguf")


def test_hub_id_without_network(tmp_path: Path) -> None:
    # The test session sets HF_HUB_OFFLINE, which is what no network looks like.
    with pytest.raises(InputError, match="nobody/nothing-at-all is no local folder and cannot be fetched"):
        open_source("nobody/nothing-at-all", cache_dir=tmp_path)


def test_nan_and_inf_are_named_when_their_block_is_loaded(tmp_path: Path) -> None:
    save_pico(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    bad = {
        "model.layers.1.block_sparse_moe.experts.3.w1.weight": float("nan"),
        "model.layers.2.self_attn.o_proj.weight": float("inf"),
    }
    for name, value in bad.items():
        tensors[name][3, 5] = value
    edit_weights(tmp_path, **tensors)
    source = open_source(tmp_path)
    source.load_block(0)
    for k, name in enumerate(bad, start=1):
        with pytest.raises(InputError, match=f"{name} .* NaN or infinite"):
            source.load_block(k)


def test_opposite_infinities_and_huge_weights(tmp_path: Path, llama: Path) -> None:
    folder = copy_of(llama, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    huge = torch.full((80, 48), 3e38)  # finite, although its sum is not
    edit_weights(folder, **{name: huge})
    open_source(folder).load_block(0)
    huge[0, 0], huge[1, 1] = float("inf"), float("-inf")
    edit_weights(folder, **{name: huge})
    with pytest.raises(InputError, match=name):
        open_source(folder).load_block(0)


def test_tensors_that_do_not_fit(tmp_path: Path, llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    refused(edit_weights(copy_of(llama, tmp_path / "a"), **{name: None}), "lacks the tensor", name)
    refused(
        edit_weights(copy_of(llama, tmp_path / "b"), **{"model.layers.1.extra.weight": torch.ones(2)}),
        "model.layers.1.extra.weight",
    )
    refused(edit_weights(copy_of(llama, tmp_path / "c"), **{name: torch.ones(79, 48)}), name, "[79, 48]", "[80, 48]")
    refused(edit_config(copy_of(llama, tmp_path / "d"), num_hidden_layers=2), "model.layers.2.")
    refused(edit_config(copy_of(llama, tmp_path / "e"), num_hidden_layers=4), "lacks the tensor", "model.layers.3.")


def test_an_expert_that_is_missing_or_misshapen(tmp_path: Path) -> None:
    folder = save_pico(tmp_path / "moe", "mixtral")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    refused(
        edit_weights(copy_of(folder, tmp_path / "a"), **{name: None}),
        "model.layers.0.mlp.experts.down_proj",
        "[3, 48, 80]",
    )
    refused(
        edit_weights(copy_of(folder, tmp_path / "b"), **{name: torch.ones(48, 79)}),
        "model.layers.0.mlp.experts.down_proj",
    )


def test_tables_left_in_old_checkpoints_are_ignored_by_name(tmp_path: Path, llama: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    source = open_source(edit_weights(copy_of(llama, tmp_path), **{name: torch.ones(6)}))
    assert list(source.ignored) == [name] and name not in source.tensors


def test_models_that_are_no_float_decoders(tmp_path: Path, llama: Path) -> None:
    quantized = {"quant_method": "awq", "bits": 4}
    refused(edit_config(copy_of(llama, tmp_path / "a"), quantization_config=quantized), "already quantized with awq")
    refused(edit_config(copy_of(llama, tmp_path / "b"), is_encoder_decoder=True), "encoder-decoder")
    refused(edit_config(copy_of(llama, tmp_path / "c"), architectures=["BertForMaskedLM"]), "BertForMaskedLM")
    refused(edit_config(copy_of(llama, tmp_path / "d"), model_type="bert", architectures=...), "is an encoder")
    refused(edit_config(copy_of(llama, tmp_path / "e"), model_type="t5", architectures=...), "encoder-decoder")
    refused(edit_config(copy_of(llama, tmp_path / "f"), model_type="martian"), "martian")
    refused(edit_config(copy_of(llama, tmp_path / "g"), num_attention_heads="many"), "config.json")
    nested = {"text_config": {"quantization_config": quantized}}
    refused(edit_config(copy_of(llama, tmp_path / "h"), **nested), "already quantized with awq")


def test_remote_code_is_not_run(tmp_path: Path, llama: Path) -> None:
    folder = edit_config(copy_of(llama, tmp_path), model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    refused(folder, "trust_remote_code")


def test_no_permission(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(llama, tmp_path / "m")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(folder, "no permission to read the folder")
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(loader, "list_tensors", refuse)
    refused(folder, "no permission to read")


def test_tokenizer_is_missed_with_a_sentence(llama: Path) -> None:
    with pytest.raises(InputError, match="no usable tokenizer"):
        open_source(llama).tokenizer()

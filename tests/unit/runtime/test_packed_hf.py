"""Checkpoints through transformers: load, generate, save again; architectures with their own ideas of a weight."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packing import pack_model
from torch import nn

from bitfloor._plugin import register_with_transformers
from bitfloor.core.errors import InputError
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.formats.files import open_tensors
from bitfloor.ops.backend import reference
from bitfloor.runtime.hf import load_packed
from bitfloor.runtime.linear import PackedEmbedding, PackedLinear, TiedHead, cache_weights
from bitfloor.runtime.swap import refusal

register_with_transformers()

COMMON: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.tensor([[5, 9, 33, 64, 7, 21, 2, 48]])
Choice = Callable[[str, str], tuple[int, int] | None]


def _model(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # biases start at zero; a lost bias must show
            nn.init.normal_(parameter, std=0.3)
    return model


def _everything(name: str, kind: str) -> tuple[int, int]:
    return (8, 32) if kind in ("embedding", "head") else (4, 16)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4},
    "falcon": {"new_decoder_architecture": False, "bias": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {},
}


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_load_save_and_load_again(kind: str, tmp_path: Path) -> None:
    source = _model(kind, **ARCHITECTURES[kind])
    config = pack_model(source, tmp_path / "a", _everything)
    assert any(described["transposed"] for described in config.layouts) == (kind in ("gpt2", "gpt_oss"))
    model = load_packed(tmp_path / "a")
    logits = _logits(model)
    # The packed model must be the float model with the dequantized weights in place of its own.
    _put_dense_weights(source, model, config.matrices)
    # Same weights; the float model multiplies fused experts and whole matrices in another order of sums.
    assert torch.allclose(logits, _logits(source), rtol=1e-4, atol=1e-5)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] <= IDS.shape[1] + 3
    model.save_pretrained(tmp_path / "b")
    first, second = read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b")
    assert first.native == second.native and set(first.tensors) == set(second.tensors)
    for name, (path, _) in first.tensors.items():
        assert torch.equal(open_tensors(path)[name], open_tensors(second.tensors[name][0])[name])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(_logits(again), logits)


def _put_dense_weights(source: Any, packed: Any, matrices: dict[str, int]) -> None:
    for name in matrices:
        module = packed.get_submodule(name)
        dense = module.dense().T if module.layout["transposed"] else module.dense()
        if module.layout["kind"] == "expert":
            path, index, param = name.rsplit(".", 2)
            source.get_parameter(f"{path}.{param}").data[int(index)] = dense
        else:
            source.get_parameter(f"{name}.weight").data.copy_(dense)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "model"
    pack_model(_model("llama", tie_word_embeddings=True), folder, _everything)
    return folder


def test_a_tied_head_shares_the_embedding_and_survives_everything(tied: Path, tmp_path: Path) -> None:
    assert not [name for name in read_checkpoint(tied).tensors if name.startswith("lm_head")]
    model = load_packed(tied)
    assert isinstance(model.lm_head, TiedHead) and isinstance(model.model.embed_tokens, PackedEmbedding)
    logits = _logits(model)
    model.tie_weights()  # transformers calls this on many occasions; there must be nothing left to tie
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(load_packed(tmp_path)), logits) and torch.equal(_logits(model), logits)


@pytest.mark.parametrize("keep", ["embedding", "head"])
def test_one_of_the_two_vocabulary_matrices_may_stay_float(keep: str, tmp_path: Path) -> None:
    choose: Choice = lambda name, kind: None if kind == keep else _everything(name, kind)  # noqa: E731
    pack_model(_model("llama", tie_word_embeddings=False), tmp_path / "m", choose)
    model = load_packed(tmp_path / "m")
    assert isinstance(model.lm_head, nn.Linear) == (keep == "head")
    assert type(model.model.embed_tokens) is (nn.Embedding if keep == "embedding" else PackedEmbedding)
    assert _logits(model).isfinite().all()


def test_a_float_embedding_stays_tied_to_its_head(tmp_path: Path) -> None:
    choose: Choice = lambda name, kind: None if kind == "embedding" else _everything(name, kind)  # noqa: E731
    pack_model(_model("llama", tie_word_embeddings=True), tmp_path / "m", choose)
    model = load_packed(tmp_path / "m")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_in_half_precision_leave_the_stored_tensors_alone(tied: Path, dtype: torch.dtype) -> None:
    exact = load_packed(tied)
    for model in (load_packed(tied, dtype=dtype), load_packed(tied).to(dtype)):
        assert model.dtype == dtype and _logits(model).dtype == dtype
        for name, buffer in model.named_buffers():
            if name.endswith(("codes", "scale", "zero")):
                assert torch.equal(buffer, exact.get_buffer(name)) and buffer.dtype == exact.get_buffer(name).dtype
        cosine = torch.cosine_similarity(_logits(model).float().flatten(), _logits(exact).flatten(), dim=0)
        assert cosine > 0.999  # two layers of half-precision rounding; a wrong scale gives less than 0.9


def test_caching_weights_changes_no_logit(tied: Path) -> None:
    model = load_packed(tied)
    with reference():
        logits = _logits(model)
    kernels = _logits(model)
    cache_weights(model)
    assert torch.equal(_logits(model), logits) and torch.equal(_logits(model), logits)
    torch.testing.assert_close(kernels, logits, rtol=1e-4, atol=1e-5)


def test_many_rows_are_multiplied_to_the_last_bit_like_the_definition(tied: Path) -> None:
    model, ids = load_packed(tied), IDS.repeat(3, 1)
    with torch.no_grad():
        kernels = model(ids).logits
        with reference():
            assert torch.equal(model(ids).logits, kernels)


def _edit(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def broken(tied: Path, tmp_path: Path) -> Path:
    for path in tied.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["quantization_config"].update(format_version=7), "format_version 7"),
        (lambda c: c["quantization_config"].update(rotation={}), "unknown key 'rotation'"),
        (lambda c: c.update(hidden_size=64), "belongs to another model"),
        (lambda c: c.update(num_hidden_layers=1), "no such module"),
        (lambda c: c["quantization_config"]["kept"].remove("model.norm.weight"), "neither packed nor kept"),
        (lambda c: c.pop("quantization_config"), "holds a float model"),
    ],
)
def test_a_wrong_configuration_gets_a_sentence(broken: Path, edit: Callable[[Any], None], message: str) -> None:
    _edit(broken, edit)
    with pytest.raises(InputError, match=message):
        load_packed(broken)


def test_transformers_itself_reports_the_same_sentences(broken: Path) -> None:
    _edit(broken, lambda c: c["quantization_config"]["layouts"][0]["segments"][0].update(bits=2))
    with pytest.raises(InputError, match="the configuration says"):
        transformers.AutoModelForCausalLM.from_pretrained(broken)
    _edit(broken, lambda c: c["quantization_config"].update(format_version=7))
    with pytest.raises(InputError, match="format_version 7"):
        transformers.AutoModelForCausalLM.from_pretrained(broken)


def test_modules_with_a_product_of_their_own_are_refused() -> None:
    class Normed(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).tanh()

    class NormedEmbedding(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).tanh()

    assert "own product" in str(refusal(Normed(2, 2), "linear"))
    assert "own lookup" in str(refusal(NormedEmbedding(2, 2), "embedding"))
    assert "not a Conv1D" in str(refusal(nn.Linear(2, 2), "conv1d"))
    assert refusal(nn.Linear(2, 2), "head") is refusal(nn.Embedding(2, 2), "embedding") is None


def test_registration_waits_for_transformers_without_importing_it() -> None:
    code = (
        "import sys\n"
        "from bitfloor._plugin import register_with_transformers as register\n"
        "register(); register()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from transformers.quantizers import auto\n"
        "register()\n"
        "print(auto.AUTO_QUANTIZER_MAPPING['bitfloor'].__name__, type(auto.__spec__.loader).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["BitfloorQuantizer", "SourceFileLoader"], done.stderr


def test_a_linear_layer_keeps_its_float_bias(tmp_path: Path) -> None:
    source = _model("llama", tie_word_embeddings=False, attention_bias=True)
    pack_model(source, tmp_path / "m", _everything)
    model = load_packed(tmp_path / "m")
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, PackedLinear)
    assert torch.equal(layer.bias, source.model.layers[0].self_attn.q_proj.bias)

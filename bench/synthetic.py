"""Llama checkpoints with random weights, of any depth, and text for them: models to measure memory and resuming on.

Weights are made and written one shard a layer, so that building needs the memory of one layer. What such a model says
is noise; how much memory quantizing it takes, and whether a resumed run gives the same bytes, does not depend on that.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALIBRATION = "calibration.txt"


@dataclass(frozen=True)
class Shape:
    """Size of a model. ``hidden`` is a multiple of ``head_dim``, ``dtype`` a torch dtype by name."""

    layers: int
    hidden: int
    intermediate: int
    head_dim: int = 64
    dtype: str = "bfloat16"

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim


def build(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write a checkpoint and return the bytes of its weights.

    Args:
        folder: made if need be.
        shape: of the model.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(*sizes: int) -> Any:
        return torch.empty(sizes).normal_(0.0, 0.02, generator=generator).to(dtype)

    groups = [{"model.embed_tokens.weight": (vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}]
    groups += [_layer(k, shape) for k in range(shape.layers)]
    where, total = {}, 0
    for index, group in enumerate(groups):
        name = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        ones = torch.ones(shape.hidden, dtype=dtype)
        tensors = {key: normal(*sizes) if len(sizes) == 2 else ones.clone() for key, sizes in group.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(folder / "config.json", config_of(shape, vocabulary))
    return total


def _layer(k: int, shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, wide = shape.hidden, shape.intermediate
    sizes: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
    sizes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    sizes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {f"model.layers.{k}.{name}.weight": size for name, size in sizes.items()}


def config_of(shape: Shape, vocabulary: int, *, tied: bool = True) -> dict[str, Any]:
    """A Llama configuration."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": shape.dtype,
    }


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges: one token a byte, and an end token. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: index + 1 for index, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<end>", "eos_token": "<end>"},
    )
    return len(vocabulary)


def write_text(folder: Path, documents: int, characters: int, seed: int = 0) -> Path:
    """A calibration text of made-up words, one document a line."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(500)]
    lines = []
    for _ in range(documents):
        line = ""
        while len(line) < characters:
            line += rng.choice(words) + " "
        lines.append(line.strip())
    path = folder / CALIBRATION
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

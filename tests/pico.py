"""Pico models: a real architecture at toy size, random weights, saved as an ordinary checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 128

# Odd sizes on purpose: 48 hidden channels are no multiple of 32 or 64, so short last groups occur everywhere.
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GEMMA = {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_tied": {**_LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**_LLAMA, "sliding_window": 6},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": _LLAMA,
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "word_embed_proj_dim": 32,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {**_LLAMA, "rotary_pct": 0.5},
    "falcon": {**_LLAMA, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True},
    "falcon_alibi": {**_LLAMA, "model_type": "falcon", "alibi": True, "new_decoder_architecture": False, "bias": True},
    "olmo2": _LLAMA,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_LLAMA, **_EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "llama4_text": {
        **_LLAMA,
        "intermediate_size_mlp": 80,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "head_dim": 16,
    },
    "gpt_oss": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 6},
}

# Beside attention these have short convolutions and recurrences, or experts in places of their own.
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 1}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_LLAMA,
        **_EXPERTS,
        "shared_expert_intermediate_size": 32,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "falcon_h1": {**_LLAMA, **_MAMBA, "mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_chunk_size": 8},
    "jamba": {
        **_LLAMA,
        **_MAMBA,
        "mamba_dt_rank": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "mamba": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "state_size": 8,
        "time_step_rank": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "lfm2": {**_LLAMA, "layer_types": ["conv", "full_attention", "conv"]},
    "jetmoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 12},
}


def pico_config(name: str, **changes: Any) -> Any:
    """The configuration of one pico model."""
    values = {**CONFIGS, **HYBRIDS}[name] | changes
    return AutoConfig.for_model(values.pop("model_type", name), **values)


def pico_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A pico model with random float32 weights, in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            pico_config(name, **changes), dtype=torch.float32, experts_implementation="eager"
        )
        generator = torch.Generator().manual_seed(seed)
        for name_, parameter in model.named_parameters():
            # Transformers starts norms at one and biases at zero, which would hide a norm or a bias that gets lost.
            scale = 0.3 if parameter.dim() > 1 else 0.1
            base = 1.0 if "norm" in name_ and name_.endswith("weight") else 0.0
            parameter.data = base + scale * torch.randn(parameter.shape, generator=generator)
        model.tie_weights()
    return model.eval()


def save_pico(
    folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes: Any
) -> Path:
    """Save a pico model into ``folder`` and return it."""
    seed = changes.pop("seed", 0)
    model = pico_model(name, seed=seed, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def token_batches(count: int = 2, *, batch: int = 2, tokens: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids int64 ``[batch, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (batch, tokens), generator=generator) for _ in range(count)]

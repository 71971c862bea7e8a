"""Reads a transformers model as the parts of a native decoder, or says why it is none.

Only models whose forward is known are read: the classes of four families, with the modules that they are made of and
packed ones in their places, without hooks. Everything else is refused with its reason: a model that computes something
else would be answered wrongly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitfloor.ops.decoder_native import DecoderParts, LayerParts, MatrixParts
from bitfloor.ops.form import PARTS, read_form
from bitfloor.ops.packed_native import TYPES
from bitfloor.runtime.linear import PackedEmbedding, PackedLinear, PackedMatrix, TiedHead, form_of

# Ways to compute plain attention, all with the same result; somebody can register others.
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length


class NotNative(Exception):
    """Why a model is none of those that the native step knows, a clause."""


def read_model(model: Any) -> DecoderParts:
    """The parts of a model, where they lie.

    Args:
        model: a causal language model of transformers.

    Raises:
        NotNative: it is none that is known.
    """
    try:
        return _read(model)
    except AttributeError as error:
        raise NotNative(f"it is not built as it should be ({error})") from error


def _read(model: Any) -> DecoderParts:
    family = _family(model)
    inner, config = model.model, model.config
    _check(family, model, "ForCausalLM", {"model", "lm_head"})
    _check(family, inner, "Model", {"embed_tokens", "layers", "norm", "rotary_emb"})
    if getattr(config, "is_causal", True) is not True:
        raise NotNative("its attention is not causal")
    if config._attn_implementation not in ATTENTION:
        raise NotNative(f"its attention is computed by {config._attn_implementation!r}")
    layers = tuple(_layer(family, index, layer, config) for index, layer in enumerate(inner.layers))
    if not layers or len(layers) != config.num_hidden_layers:
        raise NotNative(f"it has {len(layers)} layers and its configuration says {config.num_hidden_layers}")
    attention = inner.layers[0].self_attn
    head_dim = attention.head_dim
    parts = DecoderParts(
        embedding=_matrix(inner.embed_tokens),
        head=_matrix(model.lm_head),
        layers=layers,
        norm=_norm(family, inner.norm, config.rms_norm_eps),
        frequencies=_frequencies(family, inner.rotary_emb, head_dim),
        heads=layers[0].q.shape[0] // head_dim,
        kv_heads=layers[0].k.shape[0] // head_dim,
        head_dim=head_dim,
        epsilon=config.rms_norm_eps,
        scaling=attention.scaling,
        rope_scaling=inner.rotary_emb.attention_scaling,
    )
    _check_layers(inner, parts)
    if not any(matrix.form for layer in layers for matrix in layer.matrices):
        raise NotNative("none of its layers is packed")
    return parts


def _family(model: Any) -> str:
    for family in FAMILIES:
        if _is(family, model, "ForCausalLM"):
            return family
    raise NotNative(f"it knows {', '.join(FAMILIES.values())} and this is a {type(model).__name__}")


def _is(family: str, module: nn.Module, what: str) -> bool:
    kind = type(module)
    home = f"transformers.models.{family}.modeling_{family}"
    return kind.__module__ == home and kind.__qualname__ == FAMILIES[family] + what


def _check(family: str, module: nn.Module, what: str, children: set[str]) -> None:
    """A module of the family's own class, with these children and nothing put around it."""
    if not _is(family, module, what):
        raise NotNative(f"a {type(module).__name__} stands where it knows {FAMILIES[family]}{what}")
    if set(module._modules) != children:
        changed = set(module._modules) ^ children
        raise NotNative(f"{type(module).__name__} was changed ({', '.join(sorted(changed))})")
    _check_untouched(module)


def _check_untouched(module: nn.Module) -> None:
    hooks = module._forward_hooks or module._forward_pre_hooks
    if hooks or "forward" in module.__dict__:
        raise NotNative(f"something hooks into a {type(module).__name__}")


def _layer(family: str, index: int, layer: Any, config: Any) -> LayerParts:
    _check(family, layer, "DecoderLayer", {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    attention, mlp = layer.self_attn, layer.mlp
    normed = family == "qwen3"
    norms = {"q_norm", "k_norm"} if normed else set()
    _check(family, attention, "Attention", {"q_proj", "k_proj", "v_proj", "o_proj", *norms})
    _check(family, mlp, "MLP", {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if type(mlp.act_fn) is not nn.SiLU and type(mlp.act_fn).__name__ != "SiLUActivation":
        raise NotNative(f"its activation is {config.hidden_act}, not silu")
    if attention.is_causal is not True:
        raise NotNative("its attention is not causal")
    # Mistral has one window for all layers; the newer ones say it layer by layer; Llama has none.
    window = config.sliding_window if family == "mistral" else getattr(attention, "sliding_window", None)
    epsilon = config.rms_norm_eps
    return LayerParts(
        *(_matrix(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(_matrix(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")),
        attention_norm=_norm(family, layer.input_layernorm, epsilon),
        mlp_norm=_norm(family, layer.post_attention_layernorm, epsilon),
        q_norm=_norm(family, attention.q_norm, epsilon) if normed else None,
        k_norm=_norm(family, attention.k_norm, epsilon) if normed else None,
        window=window or 0,
    )


def _check_layers(inner: Any, parts: DecoderParts) -> None:
    """All layers alike, and their matrices of the sizes that the attention asks for."""
    hidden = parts.embedding.shape[1]
    wide, narrow = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
    intermediate = parts.layers[0].gate.shape[0]
    shapes = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide)]
    shapes += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    if parts.head.shape != parts.embedding.shape or not parts.kv_heads or parts.heads % parts.kv_heads:
        raise NotNative("its embedding, head and attention do not fit together")
    for module, layer in zip(inner.layers, parts.layers, strict=True):
        attention = module.self_attn
        alike = attention.head_dim == parts.head_dim and attention.scaling == parts.scaling
        if [matrix.shape for matrix in layer.matrices] != shapes or not alike:
            raise NotNative("its layers are not of one shape")


def _matrix(module: nn.Module) -> MatrixParts:
    _check_untouched(module)
    bias = getattr(module, "bias", None)
    if isinstance(module, TiedHead):
        source = _matrix(module._source[0])
        return MatrixParts(source.form, source.parts, source.dense, _on_cpu(bias))
    if type(module) in (PackedLinear, PackedEmbedding):
        assert isinstance(module, PackedMatrix)
        parts = module.parts()
        given = tuple(_on_cpu(parts[name]) for name in PARTS if name in parts)
        return MatrixParts(read_form(tuple(form_of(module.layout))), given, None, _on_cpu(bias))
    if type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None):
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight.dtype not in TYPES:
            raise NotNative(f"a {type(module).__name__} in it is {weight.dtype}")
        return MatrixParts(None, (), _on_cpu(weight), _on_cpu(bias))
    raise NotNative(f"it has no product for a {type(module).__name__}")


def _norm(family: str, module: nn.Module, epsilon: float) -> Tensor:
    _check(family, module, "RMSNorm", set())
    if module.variance_epsilon != epsilon:
        raise NotNative("its norms do not all have one epsilon")
    return _on_cpu(module.get_parameter("weight"))


def _frequencies(family: str, module: Any, head_dim: int) -> Tensor:
    _check(family, module, "RotaryEmbedding", set())
    if module.rope_type not in ROPE_TYPES:
        raise NotNative(f"its positions are scaled by {module.rope_type!r}, which depends on the length")
    found: Tensor = module.inv_freq
    if found.shape != (head_dim // 2,) or head_dim % 2:
        raise NotNative(f"its positions turn {2 * found.numel()} of {head_dim} channels of a head")
    return _on_cpu(found)


def _on_cpu(tensor: Any) -> Any:
    if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
        raise NotNative(f"it is on {tensor.device}, not on the CPU")
    return tensor

"""What a model is made of: where its decoder blocks are, which matrices can be quantized, and what is kept as it is.

Nothing here goes by a model's name. A matrix is quantizable because of what holds it (``nn.Linear``, transformers'
``Conv1D``, or a stacked parameter of experts); a parameter is kept because it is a vector, a norm, a bias, a router, or
part of the depthwise convolutions and recurrences of hybrid models. Anything else in a block is refused with its name,
because a weight skipped in silence is a wrong bit count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef

_ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "wg"}
_STATE_SPACE = {"A_log"}  # [channels, states] in Mamba, a vector in what came after it
_READ_DIRECTLY = {"dt_proj"}  # a narrow Linear of Mamba, multiplied by its weight and not by a call
_EXPERT_LISTS = re.compile(r"experts$|expert$")
# Subclasses of nn.Linear with a forward of their own that is the same product.
_PLAIN_LINEARS = {"FalconLinear"}
_INTO_HIDDEN = re.compile(r"down|w2$|output|wo$|c_proj")
_FROM_HIDDEN = re.compile(r"up|gate|w1|w3|input|wi|c_fc|v1")


@dataclass(frozen=True)
class ModelMap:
    """The parts of a decoder-only language model.

    Args:
        blocks_path: the ``ModuleList`` of decoder blocks, e.g. ``"model.layers"``.
        n_blocks: how many blocks it has.
        matrices: every quantizable matrix inside the blocks, in module order.
        embedding: the token embedding ``[V, D]``.
        head: the language-model head ``[V, D]``; given when tied too (it is then the embedding's matrix).
        tied: head and embedding are one matrix.
        kept: parameters and persistent buffers that stay as they are.
        reasons: kept name -> why.
    """

    blocks_path: str
    n_blocks: int
    matrices: tuple[MatrixRef, ...]
    embedding: MatrixRef | None
    head: MatrixRef | None
    tied: bool
    kept: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)

    def block_path(self, k: int) -> str:
        """Path of block ``k`` from the model root."""
        return f"{self.blocks_path}.{k}"

    def block_matrices(self, k: int) -> list[MatrixRef]:
        """The quantizable matrices of block ``k``, in module order."""
        return [ref for ref in self.matrices if ref.block == k]


def describe(model: PreTrainedModel) -> ModelMap:
    """Map a skeleton.

    Args:
        model: a causal language model; its parameters may be on meta.

    Raises:
        InputError: no stack of decoder blocks, more than one stack, or a parameter bitfloor does not know how to treat.
    """
    path, blocks = find_blocks(model)
    reasons: dict[str, str] = {}
    matrices: list[MatrixRef] = []
    for k, block in enumerate(blocks):
        matrices += _block_matrices(block, f"{path}.{k}", k, model.config, reasons)
    if not matrices:
        raise InputError(f"the blocks {path} of {type(model).__name__} hold no matrix that bitfloor can quantize.")
    embedding, head, tied = _ends(model)
    taken = {ref.param for ref in matrices}
    taken |= {ref.param for ref in (embedding, head) if ref is not None}
    for name in _stored_names(model):
        if name not in taken and name not in reasons:
            reasons[name] = "outside the blocks" if not name.startswith(f"{path}.") else "vector"
    kept = tuple(name for name in _stored_names(model) if name in reasons)
    return ModelMap(path, len(blocks), tuple(matrices), embedding, head, tied, kept, reasons)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder blocks: the outermost ``ModuleList`` with the most parameters.

    Raises:
        InputError: there is none, or a second stack (a vision tower, an encoder) holds matrices of its own.
    """
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    outer = {n: m for n, m in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks)}
    sized = {n: sum(p.numel() for p in m.parameters()) for n, m in outer.items()}
    sized = {n: size for n, size in sized.items() if size}
    if not sized:
        raise InputError(
            f"{type(model).__name__} has no list of decoder blocks, so bitfloor cannot work block by block."
        )
    path = max(sized, key=lambda n: sized[n])
    for other in sized:
        if other != path and any(p.dim() > 1 for p in outer[other].parameters()):
            raise InputError(
                f"{type(model).__name__} has a second stack of blocks, {other}, beside {path}; models with "
                "a vision tower, "
                "an encoder or several decoders are not supported."
            )
    return path, outer[path]


def _stored_names(model: nn.Module) -> list[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return [name for name in model.state_dict() if name not in tied]


def _block_matrices(
    block: nn.Module, prefix: str, k: int, config: PretrainedConfig, reasons: dict[str, str]
) -> Iterator[MatrixRef]:
    experts = _expert_parents(block)
    for local, module in block.named_modules():
        path = f"{prefix}.{local}" if local else prefix
        for pname, param in module.named_parameters(recurse=False):
            full = f"{path}.{pname}"
            why = _kept_reason(local, module, pname, param.dim(), experts)
            if why is not None:
                reasons[full] = why
            elif isinstance(module, nn.Linear) and pname == "weight" and is_plain_linear(module):
                yield MatrixRef(path, full, (param.shape[0], param.shape[1]), k, "linear")
            elif isinstance(module, Conv1D) and pname == "weight":
                yield MatrixRef(path, full, (param.shape[1], param.shape[0]), k, "conv1d", transposed=True)
            elif param.dim() == 3 and not isinstance(module, nn.Conv1d):
                yield from _stacked(path, module, pname, k, config)
            else:
                raise InputError(
                    f"{full} has shape {list(param.shape)} and belongs to {type(module).__name__}, which "
                    "bitfloor does not "
                    "know; only Linear, Conv1D and stacked experts can be quantized."
                )


def is_plain_linear(module: nn.Linear) -> bool:
    """A subclass may do anything with its weight; only those known to compute the plain product can be replaced."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ in _PLAIN_LINEARS


def _expert_parents(block: nn.Module) -> set[str]:
    """Modules that own experts: a child named so, or a child with three-dimensional parameters."""
    parents = set()
    for name, module in block.named_modules():
        stacked = any(p.dim() == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)
        if name and (stacked or _EXPERT_LISTS.search(name)):
            parents.add(name.rpartition(".")[0])
    return parents


def _kept_reason(local: str, module: nn.Module, pname: str, dim: int, expert_parents: set[str]) -> str | None:
    kind = type(module).__name__
    parent, _, last = local.rpartition(".")
    if last in _ROUTER_NAMES and parent in expert_parents or "router" in kind.lower():
        return "router"
    if "router" in last and (parent in expert_parents or parent.rpartition(".")[0] in expert_parents):
        return "router"
    if parent.rpartition(".")[2] in ("router", "gate") and parent.rpartition(".")[0] in expert_parents:
        return "router"
    if pname.endswith("bias"):
        return "bias"
    if "norm" in kind.lower():
        return "norm"
    if pname in _STATE_SPACE or last in _READ_DIRECTLY:
        return "state-space parameter"
    if isinstance(module, nn.Conv1d) and module.groups == module.in_channels:
        return "depthwise convolution"
    return "vector" if dim <= 1 else None


def _stacked(path: str, module: nn.Module, pname: str, k: int, config: PretrainedConfig) -> Iterator[MatrixRef]:
    """The matrices of a stacked parameter ``[E, O, I]`` (or ``[E, I, O]``), one per expert."""
    param = module.get_parameter(pname)
    full = f"{path}.{pname}"
    transposed = _is_transposed(full, module, pname, (param.shape[1], param.shape[2]), config)
    shape = (param.shape[2], param.shape[1]) if transposed else (param.shape[1], param.shape[2])
    for index in range(param.shape[0]):
        yield MatrixRef(f"{path}.{index}.{pname}", full, shape, k, "expert", index, transposed)


def _is_transposed(full: str, module: nn.Module, pname: str, inner: tuple[int, int], config: PretrainedConfig) -> bool:
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    hidden: int = config.get_text_config().hidden_size
    label = pname if pname != "weight" else full.split(".")[-2]
    ends = [bool(size == hidden) for size in inner]
    if ends[0] != ends[1]:
        if _INTO_HIDDEN.search(label):
            return ends[1]
        if _FROM_HIDDEN.search(label):
            return ends[0]
    raise InputError(
        f"{full} stacks experts of shape {list(inner)}, and neither its name nor its sizes tell which side "
        "is the input; "
        "bitfloor cannot quantize it safely."
    )


def _ends(model: PreTrainedModel) -> tuple[MatrixRef | None, MatrixRef | None, bool]:
    paths = {id(module): name for name, module in model.named_modules()}
    embed, out = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = head = None
    if isinstance(embed, nn.Embedding):
        name = paths[id(embed)]
        embedding = MatrixRef(name, f"{name}.weight", (embed.weight.shape[0], embed.weight.shape[1]), -1, "embedding")
    if isinstance(out, nn.Linear):
        name = paths[id(out)]
        head = MatrixRef(name, f"{name}.weight", (out.weight.shape[0], out.weight.shape[1]), -1, "head")
    if embedding is None:
        raise InputError(
            f"the token embedding of {type(model).__name__} is a {type(embed).__name__}, which bitfloor does not know."
        )
    if head is None:
        raise InputError(
            f"{type(model).__name__} has no linear language-model head, so it cannot be used as a language model."
        )
    tied_keys = getattr(model, "all_tied_weights_keys", None) or {}
    tied = head.param in tied_keys or embedding.param in tied_keys
    others = sorted(set(tied_keys) - {head.param, embedding.param} - {f"{head.name}.bias"})
    if others:
        raise InputError(
            f"{others[0]} shares its weights with {tied_keys[others[0]]}; blocks that share weights are not supported."
        )
    return embedding, head, tied

"""Puts packed modules in the places a native configuration names, in any Hugging Face skeleton."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from bitfloor.core.errors import InputError
from bitfloor.formats.layout import Layout, NativeConfig
from bitfloor.modeling.discover import is_plain_linear
from bitfloor.runtime.experts import install_stack
from bitfloor.runtime.linear import PackedLinear, PackedMatrix, TiedHead, convert_embedding

SCALED_EMBEDDING = "ScaledWordEmbedding"  # subclasses of nn.Embedding that scale what super().forward returns


def refusal(module: nn.Module, kind: str) -> str | None:
    """Why a packed module cannot take this module's place, or None if it can.

    Args:
        module: the float module (for ``"expert"``, the experts module).
        kind: kind of the matrix, see :class:`bitfloor.core.spec.MatrixRef`.
    """
    name = type(module).__name__
    if kind == "embedding":
        plain = type(module).forward is nn.Embedding.forward or name.endswith(SCALED_EMBEDDING)
        return None if isinstance(module, nn.Embedding) and plain else f"{name} is an embedding with its own lookup"
    if kind == "conv1d":
        return None if name == "Conv1D" else f"{name} is not a Conv1D"
    if kind == "expert":
        return None
    return (
        None
        if isinstance(module, nn.Linear) and is_plain_linear(module)
        else f"{name} is a linear layer with its own product"
    )


def install(model: nn.Module, config: NativeConfig) -> dict[str, PackedMatrix]:
    """Replace every matrix that ``config`` names by an empty packed module; weights are loaded afterwards.

    Args:
        model: float skeleton, usually on the meta device; changed in place.
        config: checked configuration.

    Returns:
        Matrix name to the module that holds it.

    Raises:
        InputError: the model has no such module, or one that cannot be replaced, or of another shape.
    """
    made: dict[str, PackedMatrix] = {}
    stacks: dict[tuple[str, str], dict[int, PackedMatrix]] = defaultdict(dict)
    for name in sorted(config.matrices, key=lambda name: name in config.orders):
        layout = config.layout_of(name)
        order_from = made[config.orders[name]] if name in config.orders else None
        if layout["kind"] == "expert":
            made[name] = _make_expert(model, name, layout, order_from, stacks)
        else:
            made[name] = _replace(model, name, layout, order_from)
    for (path, param), matrices in stacks.items():
        experts = model.get_submodule(path)
        count = experts.get_parameter(param).shape[0]
        if sorted(matrices) != list(range(count)):
            raise InputError(f"{path}.{param} has {count} experts and the checkpoint {len(matrices)}; copy it again.")
        install_stack(experts, param, [matrices[index] for index in range(count)])
    _tie_heads(model, config, made)
    return made


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(
            f"the checkpoint packs {name!r} and this model has no such module; config.json belongs to another one."
        ) from error


def _replace(model: nn.Module, name: str, layout: Layout, order_from: PackedMatrix | None) -> PackedMatrix:
    module = _find(model, name)
    if reason := refusal(module, layout["kind"]):
        raise InputError(f"{name} cannot be loaded packed: {reason}; use the float model.")
    weight = module.get_parameter("weight")
    _check_shape(name, tuple(weight.shape), layout)
    if isinstance(module, nn.Embedding):
        return convert_embedding(module, layout)
    bias = module._parameters.get("bias")
    packed = PackedLinear(layout, bias is not None, weight.dtype, weight.device, order_from)
    packed.bias = bias
    packed.train(module.training)
    model.set_submodule(name, packed)
    return packed


def _make_expert(
    model: nn.Module,
    name: str,
    layout: Layout,
    order_from: PackedMatrix | None,
    stacks: dict[tuple[str, str], dict[int, PackedMatrix]],
) -> PackedMatrix:
    path, index, param = name.rsplit(".", 2)
    stack = _find(model, path)._parameters.get(param)
    if stack is None or stack.dim() != 3 or not index.isdigit():
        raise InputError(f"the checkpoint packs {name!r} and this model has no such expert; check its config.json.")
    _check_shape(name, tuple(stack.shape[1:]), layout)
    stacks[path, param][int(index)] = packed = PackedMatrix(layout, stack.dtype, stack.device, order_from)
    return packed


def _check_shape(name: str, found: tuple[int, ...], layout: Layout) -> None:
    expected = tuple(layout["shape"][::-1] if layout["transposed"] else layout["shape"])
    if found != expected:
        raise InputError(
            f"{name} is {list(expected)} in the checkpoint and {list(found)} in this model; "
            "its config.json belongs to another model."
        )


def _tie_heads(model: nn.Module, config: NativeConfig, made: dict[str, PackedMatrix]) -> None:
    for target, source in config.tied.items():
        owner = made.get(source.removesuffix(".weight"))
        name = target.removesuffix(".weight")
        if owner is None or name in made:
            continue
        head = _find(model, name)
        if reason := refusal(head, "head"):
            raise InputError(f"{name} cannot share a packed matrix: {reason}; use the float model.")
        model.set_submodule(name, TiedHead(owner, head._parameters.get("bias")))


def packed_parameters(config: NativeConfig) -> set[str]:
    """Names of the float parameters that no longer exist once :func:`install` has run, heads that share included."""
    gone = {f"{name}.weight" for name in config.matrices}
    return gone | {target for target, source in config.tied.items() if source in gone}

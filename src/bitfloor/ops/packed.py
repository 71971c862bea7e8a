"""The operators of packed matrices, declared to torch once: ``torch.ops.bitfloor``.

    packed_linear(x, parts, bias, form, activations)     x [..., I] to [..., O], in the dtype of x
    packed_embedding(ids, parts, form, dtype)            rows, [...] to [..., I]
    packed_input(x, parts, form)                         the input side alone, to float32 [..., padded]
    packed_product(stored, parts, bias, form, activations)   the rest of packed_linear, float32 [..., O]
    packed_gradient(grad, parts, form)                   of x: grad [..., O] to [..., I], in the dtype of grad

``form`` and ``parts`` are described in :mod:`bitfloor.ops.form`; ``activations`` is ``"float"`` or ``"int8"``. Matrices
that share order, channels, rotation and partition, and have no channel scales, can share a ``packed_input``. Torch
chooses by device: every device has the definition (:mod:`bitfloor.ops.packed_reference`), the CPU and NVIDIA's GPUs
have kernels. See docs/decisions/0018 and 0021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfloor.core.basis import ordered, restored
from bitfloor.core.errors import BitfloorError, InputError
from bitfloor.core.rotation import rotate
from bitfloor.ops import packed_native, packed_reference, packed_triton, reference
from bitfloor.ops.backend import ACTIVATIONS, INT8, REFERENCE, backend
from bitfloor.ops.form import Form, read_form
from bitfloor.ops.packed_native import MOST_ROWS, TYPES, PackedLibrary
from bitfloor.ops.packed_triton import PackedGPU

SCHEMAS = {
    "packed_linear": "(Tensor x, Tensor[] parts, Tensor? bias, int[] form, str activations) -> Tensor",
    "packed_embedding": "(Tensor ids, Tensor[] parts, int[] form, ScalarType dtype) -> Tensor",
    "packed_input": "(Tensor x, Tensor[] parts, int[] form) -> Tensor",
    "packed_product": "(Tensor stored, Tensor[] parts, Tensor? bias, int[] form, str activations) -> Tensor",
    "packed_gradient": "(Tensor grad, Tensor[] parts, int[] form) -> Tensor",
}
LIBRARY = torch.library.Library("bitfloor", "DEF")  # type: ignore[no-untyped-call]


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str) -> Tensor:
    """``torch.ops.bitfloor.packed_linear``."""
    found: Tensor = torch.ops.bitfloor.packed_linear(x, parts, bias, form, activations)
    return found


def embedding(ids: Tensor, parts: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.ops.bitfloor.packed_embedding``."""
    found: Tensor = torch.ops.bitfloor.packed_embedding(ids, parts, form, dtype)
    return found


def _checked(
    x: Tensor, width: str, parts: Sequence[Tensor], form: Sequence[int], bias: Tensor | None = None, mode: str = INT8
) -> Form:
    """The form of a call whose arguments fit together.

    Args:
        x: floating point ``[..., I]`` or ``[..., padded]``.
        width: which of the two, ``"I"`` or ``"padded"``, or ``"O"`` for a gradient.
        parts, form, bias, mode: see the operators.

    Raises:
        InputError: they do not.
    """
    found = read_form(tuple(form))
    found.check_parts(parts, x.device)
    columns = {"I": found.shape[1], "padded": found.padded, "O": found.shape[0]}[width]
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != columns:
        raise InputError(f"the input is {x.dtype} {list(x.shape)} and must be floating point [..., {columns}].")
    if bias is not None and (bias.shape != (found.shape[0],) or bias.device != x.device):
        raise InputError(
            f"the bias is {list(bias.shape)} on {bias.device} and must be [{found.shape[0]}] on {x.device}."
        )
    if mode not in ACTIVATIONS:
        raise InputError(f"activations = {mode!r} is not known; use one of {', '.join(ACTIVATIONS)}.")
    return found


def _checked_ids(ids: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Form:
    found = read_form(tuple(form))
    found.check_parts(parts, ids.device)
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"row numbers are {ids.dtype}; give int64 or int32.")
    return found


def _kernels(*tensors: Tensor) -> PackedLibrary | None:
    """The library of the CPU, if it is wanted and can take the types of these tensors."""
    if backend() == REFERENCE or any(tensor.dtype not in TYPES for tensor in tensors):
        return None
    return packed_native.load().library


def _as_given(x: Tensor) -> torch.autocast:
    """Torch's own products do not follow autocast here: results have the type of ``x``, whoever computes."""
    return torch.autocast(x.device.type, enabled=False)


# -- the definition, everywhere ---------------------------------------------------------------------------------------


def _linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str) -> Tensor:
    checked = _checked(x, "I", parts, form, bias, activations)
    with _as_given(x):
        return packed_reference.linear(x, parts, bias, checked, activations)


def _embedding(ids: Tensor, parts: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype) -> Tensor:
    return packed_reference.embedding(ids, parts, _checked_ids(ids, parts, form), dtype)


def _input(x: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    return packed_reference.stored_input(x, parts, _checked(x, "I", parts, form))


def _product(
    stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str
) -> Tensor:
    checked = _checked(stored, "padded", parts, form, bias, activations)
    with _as_given(stored):
        return packed_reference.product(stored.float(), parts, bias, checked, activations)


def _gradient(grad: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    checked = _checked(grad, "O", parts, form)
    with _as_given(grad):
        return packed_reference.input_gradient(grad, parts, checked)


# -- the CPU ----------------------------------------------------------------------------------------------------------


def _linear_cpu(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str
) -> Tensor:
    checked = _checked(x, "I", parts, form, bias, activations)
    library = _kernels(x)
    if library is not None and (activations == INT8 or x.numel() <= MOST_ROWS * x.shape[-1]):
        return library.linear(x, parts, bias, checked, activations == INT8)
    with _as_given(x):
        if library is None:
            return packed_reference.linear(x, parts, bias, checked, activations)
        return _by_panels(library, x, parts, bias, checked)


def _by_panels(library: PackedLibrary, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Form) -> Tensor:
    """For many rows, what :func:`bitfloor.ops.reference.linear` does with panels that the library made dense: every
    bit of the result is the definition's."""
    channels = form.named(parts).get("channels")
    x = rotate(ordered(x, None if channels is None else channels.to(torch.int64)), form.rotation)
    out = []
    for start, stop in reference.panels(*form.shape, x.device):
        weight = library.rows(parts, form, first=start, count=stop - start).to(x.dtype)
        out.append(F.linear(x, weight, None if bias is None else bias[start:stop].to(x.dtype)))
    return out[0] if len(out) == 1 else torch.cat(out, dim=-1)


def _embedding_cpu(ids: Tensor, parts: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype) -> Tensor:
    checked = _checked_ids(ids, parts, form)
    library = _kernels()
    if library is None:
        return packed_reference.embedding(ids, parts, checked, dtype)
    rows = library.rows(parts, checked, ids=ids.reshape(-1))
    channels = checked.named(parts).get("channels")
    rows = restored(rotate(rows, checked.rotation), None if channels is None else channels.to(torch.int64))
    return rows.to(dtype).view(*ids.shape, checked.shape[1])


def _input_cpu(x: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    checked = _checked(x, "I", parts, form)
    library = _kernels(x)
    return (library or packed_reference).stored_input(x, parts, checked)


def _product_cpu(
    stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str
) -> Tensor:
    checked = _checked(stored, "padded", parts, form, bias, activations)
    library = _kernels(stored)
    if library is None:
        return _product(stored, parts, bias, form, activations)
    return library.product(stored.float(), parts, bias, checked, activations == INT8)


def _gradient_cpu(grad: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    checked = _checked(grad, "O", parts, form)
    library = _kernels()
    if library is None:
        return _gradient(grad, parts, form)
    found = grad.new_zeros(*grad.shape[:-1], checked.shape[1])
    with _as_given(grad):
        for start, stop in reference.panels(*checked.shape, grad.device):
            weight = library.rows(parts, checked, first=start, count=stop - start)
            found += grad[..., start:stop] @ weight.to(grad.dtype)
    channels = checked.named(parts).get("channels")
    return restored(rotate(found, checked.rotation), None if channels is None else channels.to(torch.int64))


# -- a GPU ------------------------------------------------------------------------------------------------------------


def _gpu(*tensors: Tensor) -> PackedGPU | None:
    """The kernels of GPUs, if they are wanted and can take the types of these tensors."""
    if backend() == REFERENCE or any(tensor.dtype not in TYPES for tensor in tensors):
        return None
    return packed_triton.library()


def _linear_gpu(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str
) -> Tensor:
    library = _gpu(x)
    if library is None:
        return _linear(x, parts, bias, form, activations)
    checked = _checked(x, "I", parts, form, bias, activations)
    with _as_given(x):
        return library.linear(x, parts, bias, checked, activations == INT8)


def _embedding_gpu(ids: Tensor, parts: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype) -> Tensor:
    library = _gpu()
    if library is None:
        return _embedding(ids, parts, form, dtype)
    with _as_given(ids):
        return library.embedding(ids, parts, _checked_ids(ids, parts, form), dtype)


def _input_gpu(x: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    return (_gpu(x) or packed_reference).stored_input(x, parts, _checked(x, "I", parts, form))


def _product_gpu(
    stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str
) -> Tensor:
    library = _gpu(stored)
    if library is None:
        return _product(stored, parts, bias, form, activations)
    checked = _checked(stored, "padded", parts, form, bias, activations)
    with _as_given(stored):
        return library.product(stored, parts, bias, checked, activations == INT8)


def _gradient_gpu(grad: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    library = _gpu(grad)
    if library is None:
        return _gradient(grad, parts, form)
    with _as_given(grad):
        return library.gradient(grad, parts, _checked(grad, "O", parts, form))


# -- shapes, and the way back -----------------------------------------------------------------------------------------


def _linear_shape(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _checked(x, "I", parts, form, bias, activations).shape[0])


def _embedding_shape(ids: Tensor, parts: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, _checked_ids(ids, parts, form).shape[1], dtype=dtype)


def _input_shape(x: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], _checked(x, "I", parts, form).padded, dtype=torch.float32)


def _product_shape(
    stored: Tensor, parts: Sequence[Tensor], bias: Tensor | None, form: Sequence[int], activations: str
) -> Tensor:
    height = _checked(stored, "padded", parts, form, bias, activations).shape[0]
    return stored.new_empty(*stored.shape[:-1], height, dtype=torch.float32)


def _gradient_shape(grad: Tensor, parts: Sequence[Tensor], form: Sequence[int]) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _checked(grad, "O", parts, form).shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, parts, bias, ctx.form, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*parts)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of the product with the weights as they are; that activations were rounded is not seen."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.bitfloor.packed_gradient(grad, ctx.saved_tensors, ctx.form)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return of_x, [None] * len(ctx.saved_tensors), of_bias, None, None


def _no_way_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    del ctx, grad
    raise BitfloorError("packed_linear has a gradient, once, and what it is made of has none; train through that.")


def _declare() -> None:
    everywhere: list[Callable[..., Tensor]] = [_linear, _embedding, _input, _product, _gradient]
    on_cpu: list[Callable[..., Tensor]] = [_linear_cpu, _embedding_cpu, _input_cpu, _product_cpu, _gradient_cpu]
    on_gpu: list[Callable[..., Tensor]] = [_linear_gpu, _embedding_gpu, _input_gpu, _product_gpu, _gradient_gpu]
    shapes: list[Callable[..., Tensor]] = [
        _linear_shape,
        _embedding_shape,
        _input_shape,
        _product_shape,
        _gradient_shape,
    ]
    made = zip(SCHEMAS.items(), everywhere, on_cpu, on_gpu, shapes, strict=True)
    for (name, schema), definition, kernel, gpu, shape in made:
        LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        LIBRARY.impl(name, definition, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        LIBRARY.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
        LIBRARY.impl(name, gpu, "CUDA")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"bitfloor::{name}", shape, lib=LIBRARY)
    torch.library.register_autograd("bitfloor::packed_linear", _linear_backward, setup_context=_keep, lib=LIBRARY)
    for name in ("packed_input", "packed_product", "packed_gradient"):
        torch.library.register_autograd(f"bitfloor::{name}", _no_way_back, lib=LIBRARY)


_declare()

"""Whether the packed kernels of a GPU are right, for ``gpu.py``: operators against their definition, on that GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NEAR = 1e-3  # of the largest output
HALF_NEAR = 5e-3  # where outputs are half precision, and so rounded

Call = Callable[[], Any]


def random_parts(form: Any, seed: int = 0) -> list[Any]:
    """Random parts of a form on the GPU; orders are permutations."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(seed)
    parts = []
    for name, (dtype, shape) in form.parts.items():
        if name in ("order", "channels"):
            part = torch.randperm(shape[0], generator=generator, device="cuda").cpu().to(dtype).cuda()
        elif dtype == torch.uint8:
            part = torch.randint(0, 256, shape, generator=generator, device="cuda", dtype=dtype)
        else:
            part = (torch.rand(shape, generator=generator, device="cuda") * 0.02 + 1e-3).to(dtype)
        parts.append(part)
    return parts


def small_cases(quick: bool) -> list[tuple[str, list[int], int, str]]:
    """Name, form, rows of x and type of x of what is checked: every width and kind, then everything else."""
    found = []
    for at, bits in enumerate((4, 2, 3, 1, 5, 6, 8)):
        form = [200, 600, 0, 0, 0, 0, 0, 600, bits, 64, at % 3, 2 * at + 1 if at % 3 == 2 else 0, 0]
        found.append((f"{bits} bits, kind {at % 3}", form, 1, "float16"))
    everything = [500, 1000, 1, 1000, 64, 1, 1, 100, 1, 128, 1, 0, 1, 500, 2, 64, 0, 0, 1, 400, 3, 32, 2, 7, 1]
    uneven = [200, 600, 0, 0, 0, 0, 0, 600, 3, 24, 0, 0, 0]
    tall = [4096, 4096, 0, 0, 64, 0, 0, 4096, 2, 64, 0, 0, 0]
    for rows, dtype in ((1, "float32"), (3, "bfloat16"), (8, "float16"), (9, "float16"), (70, "bfloat16")):
        found.append((f"everything, {rows} rows", everything, rows, dtype))
    found += [("uneven groups", uneven, 2, "float16"), ("uneven groups, float32", uneven, 20, "float32")]
    for rows in (1, 2, 4, 64, 300):
        found.append((f"4096 x 4096, {rows} rows", tall, rows, "float16"))
    return found[:3] if quick else found


def check(form: list[int], rows: int, dtype: str) -> dict[str, Any]:
    """All operators on a matrix against the definition on the GPU, twice for the same bits, and in a graph."""
    import torch

    from bitfloor.ops import packed
    from bitfloor.ops.backend import FLOAT, INT8, reference
    from bitfloor.ops.form import read_form

    known = read_form(tuple(form))
    parts = random_parts(known)
    generator = torch.Generator(device="cuda").manual_seed(1)
    x = torch.randn(rows, known.shape[1], generator=generator, device="cuda").to(getattr(torch, dtype))
    ids = torch.tensor([0, known.shape[0] - 1, 5], device="cuda")
    grad = torch.randn(2, known.shape[0], generator=generator, device="cuda")
    ops = torch.ops.bitfloor
    calls: dict[str, Call] = {
        "float": lambda: packed.linear(x, parts, None, form, FLOAT),
        "int8": lambda: packed.linear(x, parts, None, form, INT8),
        "embedding": lambda: packed.embedding(ids, parts, form, torch.float32),
        "input": lambda: ops.packed_input(x, parts, form),
        "product": lambda: ops.packed_product(ops.packed_input(x, parts, form), parts, None, form, FLOAT),
        "gradient": lambda: ops.packed_gradient(grad, parts, form),
    }
    found: dict[str, Any] = {}
    right = True
    for name, call in calls.items():
        y = call()
        with reference():
            wanted = call().double()
        off = float((y.double() - wanted).abs().max() / wanted.abs().max())
        # Both sides round their outputs, and where x is half, their weights.
        near = HALF_NEAR * (4 if dtype == "bfloat16" else 1) if y.dtype != torch.float32 else NEAR
        found[name] = off
        right = right and off <= near and bool(torch.equal(call(), y))
    graph, y = captured(calls["float"], calls["float"])
    graph.replay()
    torch.cuda.synchronize()
    return {"off": found, "right": right and bool(torch.equal(y, calls["float"]()))}


def captured(warm: Call, work: Call) -> tuple[Any, Any]:
    """A graph of some work, and what it returns."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found

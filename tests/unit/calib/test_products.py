"""Products in bfloat16: what is rounded in a block, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from unit.calib.test_block import first_block

from bitfloor.calib.block import BlockRunner


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_products_in_bfloat16_leave_the_residual_stream_in_float32(name: str) -> None:
    plain, xs = first_block(name)
    mixed = BlockRunner(
        plain.module,
        plain.names[0].split(".self_attn")[0].split(".attn")[0],
        list(plain._refs.values()),
        plain._calls,
        torch.bfloat16,
    )
    seen: dict[str, set[torch.dtype]] = {}
    mixed.observe(xs, lambda n, x: seen.setdefault(n, set()).add(x.dtype), mixed.names)
    exact, found = plain.forward(xs[0], 0), mixed.forward(xs[0], 0)
    assert found.dtype == torch.float32 and not torch.equal(exact, found)
    change = (exact - xs[0]).square().mean()
    assert float((exact - found).square().mean()) < 1e-3 * float(
        change
    )  # some roundings of 2^-9 each, on large random weights
    if name == "llama":
        assert seen[next(n for n in mixed.names if n.endswith("o_proj"))] == {torch.bfloat16}
    # The weights are rounded inside the product, and the gradient comes back in float32.
    override = plain.weight(plain.names[0]).clone().requires_grad_()
    mixed.forward(xs[0], 0, {plain.names[0]: override}).square().sum().backward()
    assert override.grad is not None and override.grad.dtype == torch.float32 and bool(override.grad.any())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_routers_decide_in_float32(name: str) -> None:
    plain, xs = first_block(name)
    prefix = plain.names[0].split(".self_attn")[0]
    mixed = BlockRunner(plain.module, prefix, list(plain._refs.values()), plain._calls, torch.bfloat16)
    (router,) = [part for part in mixed._others if "Router" in type(part).__name__]
    seen: list[Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = router.register_forward_hook(note)
    mixed.forward(xs[0], 0)
    handle.remove()
    assert seen[0].dtype == torch.float32
    assert all("forward" not in part.__dict__ for part in mixed.module.modules())

"""BlockRunner: run, look into, and run with other weights, without touching the block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pico import pico_model, save_pico, token_batches
from torch import Tensor, nn

from bitfloor.calib.block import BlockRunner
from bitfloor.calib.capture import Call, capture
from bitfloor.core.errors import BitfloorError
from bitfloor.core.spec import MatrixRef
from bitfloor.modeling.discover import describe


def first_block(name: str, batches: list[Tensor] | None = None, k: int = 0, **changes: Any) -> tuple[BlockRunner, Any]:
    """Runner of block ``k`` of a pico model, and inputs for it (the model's own for block 0)."""
    model = pico_model(name, **changes).requires_grad_(False)
    parts = describe(model)
    runs = capture(model, parts.blocks_path, batches if batches is not None else token_batches(3))
    block = model.get_submodule(parts.block_path(k))
    return BlockRunner(block, parts.block_path(k), parts.block_matrices(k), runs.calls[k]), runs.hidden


def short(names: Any, runner: BlockRunner) -> list[Any]:
    cut = runner.names[0].split(".self_attn")[0].split(".attn")[0] + "."
    return [tuple(n.removeprefix(cut) for n in g) for g in names]


def rounded(w: Tensor) -> Tensor:
    return (w * 4).round() / 4


# -- weights and overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_weights_are_views_in_matrix_form(name: str) -> None:
    runner, _ = first_block(name)
    assert runner.names
    for matrix in runner.names:
        ref, w = runner.ref(matrix), runner.weight(matrix)
        assert w.shape == ref.shape and w.dtype == torch.float32 and not w.requires_grad
        stored = runner.module.get_parameter(
            ref.param.split(".", 3)[3] if name != "gpt2" else ref.param.split(".", 3)[3]
        )
        assert w.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "mixtral", "gpt_oss"])
def test_overrides_equal_copied_weights_bit_for_bit(name: str) -> None:
    runner, xs = first_block(name)
    before = {n: p.detach().clone() for n, p in runner.module.named_parameters()}
    overrides = {n: rounded(runner.weight(n)) for n in runner.names}
    with torch.no_grad():
        plain = runner.forward(xs[0], 0)
        replaced = runner.forward(xs[0], 0, overrides)
        assert all(torch.equal(before[n], p) for n, p in runner.module.named_parameters())
        for n in runner.names:
            runner.weight(n).copy_(overrides[n])
        copied = runner.forward(xs[0], 0)
    assert torch.equal(replaced, copied) and not torch.equal(plain, copied)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_prepared_overrides_are_the_same_overrides(name: str) -> None:
    runner, xs = first_block(name)
    overrides = {n: rounded(runner.weight(n)) for n in runner.names}
    prepared = runner.prepare(overrides)
    with torch.no_grad():
        assert torch.equal(runner.forward(xs[0], 0, prepared), runner.forward(xs[0], 0, overrides))
    names = [runner.names[-1]]
    seen, again = collect(runner, xs, names, overrides=prepared), collect(runner, xs, names, overrides=overrides)
    assert all(torch.equal(a, b) for a, b in zip(seen[names[0]], again[names[0]], strict=True))


def test_one_expert_can_be_replaced_alone() -> None:
    runner, xs = first_block("mixtral")
    name = "model.layers.0.mlp.experts.2.down_proj"
    with torch.no_grad():
        replaced = runner.forward(xs[0], 0, {name: rounded(runner.weight(name))})
        runner.weight(name).copy_(rounded(runner.weight(name)))
        assert torch.equal(replaced, runner.forward(xs[0], 0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_reach_the_overrides(name: str) -> None:
    runner, xs = first_block(name)
    overrides = {n: runner.weight(n).clone().requires_grad_() for n in runner.names}
    runner.forward(xs[0], 0, overrides).square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in overrides.values())
    assert all(p.grad is None for p in runner.module.parameters())


def test_wrong_names_and_shapes_are_refused() -> None:
    runner, xs = first_block("llama")
    with pytest.raises(BitfloorError, match="nonsense is no quantizable matrix"):
        runner.forward(xs[0], 0, {"nonsense": torch.zeros(1, 1)})
    with pytest.raises(BitfloorError, match=r"shape \[48, 24\], but the matrix is \[24, 48\]"):
        runner.forward(xs[0], 0, {"model.layers.0.self_attn.k_proj": torch.zeros(48, 24)})


def test_a_block_that_returns_no_hidden_state() -> None:
    runner = BlockRunner(
        nn.Linear(4, 5), "b", [MatrixRef("b", "b.weight", (5, 4), 0, "linear")], [Call((None,), {}, 0)]
    )
    with pytest.raises(BitfloorError, match="not a hidden state like its input"):
        runner.forward(torch.zeros(1, 2, 4), 0)


# -- observation -------------------------------------------------------------------------------------------------------


def collect(runner: BlockRunner, xs: Iterable[Tensor], names: list[str], **kwargs: Any) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = defaultdict(list)
    runner.observe(xs, lambda n, x: seen[n].append(x), names, **kwargs)
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gpt_neox"])
def test_observed_rows_are_the_inputs_of_the_modules(name: str) -> None:
    runner, xs = first_block(name)
    truth: dict[str, list[Tensor]] = defaultdict(list)
    hooks = [
        runner.module.get_submodule(
            runner.ref(n).param.split(runner.names[0].split(".0.")[0] + ".0.")[1].rpartition(".")[0]
        ).register_forward_pre_hook(lambda _, args, n=n: truth[n].append(args[0].detach()))
        for n in runner.names
    ]
    with torch.no_grad():
        for i, x in enumerate(xs):
            runner.forward(x, i)
    for hook in hooks:
        hook.remove()
    for _ in range(2):  # the first observation runs whole forwards, later ones stop early
        seen = collect(runner, xs, runner.names)
        assert list(seen) and set(seen) == set(runner.names)
        for n in runner.names:
            assert all(torch.equal(a, b.reshape(-1, b.shape[-1])) for a, b in zip(seen[n], truth[n], strict=True))


def expert_truth(runner: BlockRunner, x: Tensor, batch: int) -> dict[int, Tensor]:
    """Tokens of each expert, worked out from the router alone."""
    mlp, got = runner.module.mlp, {}

    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        hidden, index, _weights = args
        for e in range(4):
            # First the tokens that chose the expert first, then those that chose it second.
            tokens = torch.where((index == e).t())[1]
            if len(tokens):
                got[e] = hidden[tokens]

    handle = mlp.experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        runner.forward(x, batch)
    handle.remove()
    return got


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_see_the_tokens_routed_to_them(name: str) -> None:
    runner, xs = first_block(name)
    prefix = "model.layers.0.mlp.experts"
    for _ in range(2):
        seen = collect(runner, [xs[0]], [n for n in runner.names if "experts" in n])
        truth = expert_truth(runner, xs[0], 0)
        assert truth
        for e in range(4):
            for which in ("gate_up_proj", "down_proj"):
                assert (f"{prefix}.{e}.{which}" in seen) is (e in truth)
            if e in truth:
                assert torch.equal(seen[f"{prefix}.{e}.gate_up_proj"][0], truth[e])
                up = seen[f"{prefix}.{e}.down_proj"][0]
                assert up.shape == (len(truth[e]), runner.ref(f"{prefix}.{e}.down_proj").shape[1])


def test_down_inputs_of_an_expert_follow_from_its_gate_up_inputs() -> None:
    runner, xs = first_block("mixtral")
    name = "model.layers.0.mlp.experts.1"
    seen = collect(runner, [xs[0]], [f"{name}.gate_up_proj", f"{name}.down_proj"])
    gate, up = F.linear(seen[f"{name}.gate_up_proj"][0], runner.weight(f"{name}.gate_up_proj")).chunk(2, dim=-1)
    assert torch.equal(F.silu(gate) * up, seen[f"{name}.down_proj"][0])


def test_observation_runs_with_overrides() -> None:
    for name, feeder, fed in [
        ("llama", "self_attn.v_proj", "self_attn.o_proj"),
        ("mixtral", "mlp.experts.0.gate_up_proj", "mlp.experts.0.down_proj"),
    ]:
        runner, xs = first_block(name)
        zero = {f"model.layers.0.{feeder}": torch.zeros(runner.ref(f"model.layers.0.{feeder}").shape)}
        for _ in range(2):
            seen = collect(runner, [xs[0]], [f"model.layers.0.{fed}"], overrides=zero)
            assert all(not x.any() for x in seen[f"model.layers.0.{fed}"]) and seen
        assert any(x.any() for x in collect(runner, [xs[0]], [f"model.layers.0.{fed}"])[f"model.layers.0.{fed}"])


def test_a_forward_ends_once_everything_was_seen() -> None:
    runner, xs = first_block("llama")
    ran = []
    runner.module.mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    query = "model.layers.0.self_attn.q_proj"
    assert len(collect(runner, xs, [query])[query]) == 3 and len(ran) == 1  # only the first, which learns, ran on
    collect(runner, xs, [query, "model.layers.0.mlp.down_proj"])
    assert len(ran) == 4
    collect(runner, xs, [])
    assert len(ran) == 4


def test_experts_without_tokens_do_not_hold_up_the_others() -> None:
    runner, xs = first_block("mixtral", [torch.tensor([[7]])])  # one token: two of four experts get nothing
    ran = []
    runner.module.register_forward_hook(lambda *_: ran.append(1))
    names = [n for n in runner.names if "experts" in n]
    assert len(collect(runner, xs, names)) == 4 and len(ran) == 1
    assert len(collect(runner, xs, names)) == 4 and len(ran) == 1


Pairs = dict[str, list[tuple[Tensor, Tensor]]]


def collect_pairs(
    runner: BlockRunner, exact: list[Tensor], xs: list[Tensor], names: list[str], overrides: Any = None
) -> Pairs:
    got: Pairs = {}
    runner.observe_pairs(
        exact, xs, lambda n, e, x: got.setdefault(n, []).append((e.clone(), x.clone())), names, overrides
    )
    return got


@pytest.mark.parametrize("names", [["self_attn.o_proj"], ["self_attn.q_proj", "mlp.down_proj"]])
def test_pairs_are_what_the_two_versions_show_alone(names: list[str]) -> None:
    runner, xs = first_block("llama")
    wanted = [f"model.layers.0.{name}" for name in names]
    moved = [x + 0.1 * x.flip(-1) for x in xs]
    value = "model.layers.0.self_attn.v_proj"
    overrides = {value: 1.5 * runner.weight(value)}
    for _ in range(2):  # the first time the block is still being learnt
        got = collect_pairs(runner, xs, moved, wanted, overrides)
        exact, found = collect(runner, xs, wanted), collect(runner, moved, wanted, overrides=overrides)
        for name in wanted:
            assert len(got[name]) == len(xs)
            for (e, x), alone, other in zip(got[name], exact[name], found[name], strict=True):
                assert torch.equal(e, alone) and torch.equal(x, other) and not torch.equal(e, x)


def test_experts_are_not_paired() -> None:
    # The other version routes other tokens to them: row n of one would not be row n of the other.
    runner, xs = first_block("mixtral")
    names = [n for n in runner.names if "experts" in n] + ["model.layers.0.self_attn.q_proj"]
    moved = [x.flip(1) for x in xs]
    got = collect_pairs(runner, xs, moved, names)
    found = collect(runner, moved, names)
    assert set(got) == set(found)
    for name, pairs in got.items():
        assert all(torch.equal(x, alone) for (_, x), alone in zip(pairs, found[name], strict=True))
        assert all(torch.equal(e, x) == ("experts" in name) for e, x in pairs)


class Twice(nn.Module):
    """A block that uses one matrix twice and hides another from every kind of watching."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,od->bto", self.a(self.a(x)), self.experts[0])


def test_a_matrix_used_twice_is_seen_twice() -> None:
    runner = BlockRunner(Twice(), "b", [MatrixRef("b.a", "b.a.weight", (4, 4), 0, "linear")], [Call((None,), {}, 0)])
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        first, second = collect(runner, [x], ["b.a"])["b.a"]
        assert torch.equal(first, x[0]) and torch.equal(second, runner.module.a(x)[0])


def test_experts_that_cannot_be_seen_are_said_to_be() -> None:
    refs = [MatrixRef(f"b.experts.{e}", "b.experts", (4, 4), 0, "expert", e) for e in range(2)]
    runner = BlockRunner(Twice(), "b", refs, [Call((None,), {}, 0)])
    with pytest.raises(BitfloorError, match=r"experts in b\.experts were used in a way bitfloor cannot see"):
        collect(runner, [torch.ones(1, 3, 4)], ["b.experts.0"])


class Batched(nn.Module):
    """All experts at once, as Llama 4 does: every expert gets every token, zeroed where it was not chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([x[0], x[0]])
        rows[1, 0] = 0
        return torch.bmm(rows, self.w).sum(0, keepdim=True)


def test_batched_experts_see_only_the_rows_that_are_theirs() -> None:
    refs = [MatrixRef(f"b.{e}.w", "b.w", (4, 4), 0, "expert", e, True) for e in range(2)]
    runner = BlockRunner(Batched(), "b", refs, [Call((None,), {}, 0)])
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    seen = collect(runner, [x], ["b.0.w", "b.1.w"])
    assert torch.equal(seen["b.0.w"][0], x[0]) and torch.equal(seen["b.1.w"][0], x[0, 1:])


def test_the_experts_implementation_is_put_back(tmp_path: Path) -> None:
    runner, xs = first_block("mixtral")
    config = runner.module.mlp.experts.config
    with torch.no_grad():
        eager = runner.forward(xs[0], 0)
        config._experts_implementation = "batched_mm"
        assert torch.equal(runner.forward(xs[0], 0), eager)
    assert config._experts_implementation == "batched_mm"


# -- input groups ------------------------------------------------------------------------------------------------------

_QKV, _O = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)
GROUPS = {
    "llama": [_QKV, _O, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "phi3": [("self_attn.qkv_proj",), _O, ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    # Attention and feed-forward in parallel, fed by one norm: one group across both.
    "falcon_alibi": [
        ("transformer.h.0.self_attention.query_key_value", "transformer.h.0.mlp.dense_h_to_4h"),
        ("transformer.h.0.self_attention.dense",),
        ("transformer.h.0.mlp.dense_4h_to_h",),
    ],
}


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_matrices_fed_by_one_tensor_form_a_group(name: str) -> None:
    runner, xs = first_block(name)
    groups = runner.input_groups(xs[0])
    found = groups if name == "falcon_alibi" else short(groups, runner)
    assert found == GROUPS[name]
    assert runner.stages(groups) == [[group] for group in groups]


def test_groups_and_stages_of_experts() -> None:
    runner, xs = first_block("qwen2_moe")
    groups = runner.input_groups(xs[0])
    assert sorted(n for g in groups for n in g) == sorted(runner.names)
    stages = [short(stage, runner) for stage in runner.stages(groups)]
    experts = [[(f"mlp.experts.{e}.{w}",) for e in range(4)] for w in ("gate_up_proj", "down_proj")]
    assert stages[:2] == [[_QKV], [_O]] and stages[-2:] == experts
    assert [("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")] in stages


def test_starved_experts_are_grouped_like_the_others() -> None:
    runner, xs = first_block("mixtral", [torch.tensor([[7]])])
    groups = runner.input_groups(xs[0])
    assert sorted(n for g in groups for n in g) == sorted(runner.names)
    assert len(groups) == 2 + 8 and len(runner.stages(groups)) == 4


def test_memory_that_is_used_again_makes_no_group() -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            scratch = x * 1.0
            y = self.a(scratch)
            scratch += 1.0  # the same memory, other data
            return self.b(scratch) + y

    refs = [MatrixRef(f"b.{n}", f"b.{n}.weight", (4, 4), 0, "linear") for n in "ab"]
    runner = BlockRunner(Reuse(), "b", refs, [Call((None,), {}, 0)])
    assert runner.input_groups(torch.randn(1, 3, 4)) == [("b.a",), ("b.b",)]


def test_a_saved_pico_model_is_a_folder(tmp_path: Path) -> None:
    assert (save_pico(tmp_path, "llama") / "model.safetensors").is_file()

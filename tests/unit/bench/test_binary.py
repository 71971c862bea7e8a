"""The binarization to compare with: its error, its bits, and the folder it writes."""

from __future__ import annotations

from pathlib import Path

import binary
import pytest
import torch
from pico import save_pico
from safetensors.torch import load_file


def problem(rows: int = 24, columns: int = 300, tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and inputs whose channels are of unlike size and correlated."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) * torch.randn(columns, generator=generator).exp() @ mixing
    return torch.randn(rows, columns, generator=generator) ** 3, x


def error(x: torch.Tensor, weight: torch.Tensor, made: torch.Tensor) -> float:
    return float((x @ (weight - made).T).square().sum() / (x @ weight.T).square().sum())


def test_the_error_is_below_that_of_signs_and_means() -> None:
    weight, x = problem()
    plain = weight.sign() * weight.abs().mean(1, keepdim=True)
    found = binary.binarize(weight, x.T @ x)
    assert error(x, weight, found.dense) < 0.5 * error(x, weight, plain)
    # Without correlation nothing can be made up for; planes alone are better too.
    alone = binary.binarize(weight, torch.eye(weight.shape[1]))
    assert (weight - alone.dense).square().sum() < 0.6 * (weight - plain).square().sum()


def test_errors_of_a_block_are_made_up_for_as_well_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second block starts from is what least squares puts there after the first one became zeros."""
    weight, x = problem(rows=5)
    seen: list[torch.Tensor] = []

    def zeros(part: torch.Tensor, salience: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(part.clone())
        return torch.zeros_like(part), torch.zeros(part.shape[1], dtype=torch.bool)

    monkeypatch.setattr(binary, "binarize_block", zeros)
    binary.binarize(weight, x.T @ x)
    gram = (x.T @ x).double()
    gram += binary.DAMPING * gram.diagonal().mean() * torch.eye(300)
    best = weight[:, 128:] + weight[:, :128].double() @ gram[:128, 128:] @ torch.linalg.inv(gram[128:, 128:])
    torch.testing.assert_close(seen[1].double(), best[:, :128], rtol=1e-3, atol=1e-3)
    assert torch.equal(seen[0], weight[:, :128]) and not torch.allclose(seen[1], weight[:, 128:256], atol=0.1)


def test_a_matrix_of_signs_is_kept() -> None:
    signs = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).sign()
    made = binary.binarize(0.5 * signs, torch.eye(256))
    assert torch.equal(made.dense, 0.5 * signs)


def test_bits_are_those_of_the_formula() -> None:
    weight, x = problem()
    found = binary.binarize(weight, x.T @ x)
    count = int(found.salient.sum())
    assert 3 <= count <= 3 * binary.MOST_SALIENT
    assert found.bits == binary.formula(24, 300, count)
    # By hand: 300 columns are three blocks, four scales of 16 bits a row in each; a bit a column says what is salient.
    assert found.bits == 24 * 2 * 300 + 300 + 24 * 3 * 64
    for row in found.dense:
        for first in (0, 128, 256):
            part, own = row[first : first + 128], found.salient[first : first + 128]
            assert len(part[own].unique()) <= 4 and len(part[~own].unique()) <= 4


def test_what_is_not_replaced_is_copied(tmp_path: Path) -> None:
    model = save_pico(tmp_path / "model", "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(model / "model.safetensors")
    binary.write_folder(model, tmp_path / "out", {name: torch.ones_like(before[name])})
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys() and bool((after[name] == 1).all())
    assert all(torch.equal(after[key], before[key]) for key in before if key != name)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    with pytest.raises(SystemExit, match="nowhere is not in the files"):
        binary.write_folder(model, tmp_path / "out", {"nowhere": torch.ones(1)})

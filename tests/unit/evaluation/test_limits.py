from types import SimpleNamespace

import pytest
import torch

from bitfloor.core.errors import InputError
from bitfloor.evaluation.limits import check_windows, context_length


def test_context_length(llama) -> None:
    assert context_length(llama(0)) == 32
    assert context_length(SimpleNamespace(config=SimpleNamespace())) is None
    assert context_length(SimpleNamespace(config=SimpleNamespace(max_position_embeddings=0))) is None


def test_a_multimodal_config_is_asked_for_its_text_part() -> None:
    inner = SimpleNamespace(max_position_embeddings=7, vocab_size=3)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: inner, max_position_embeddings=99))
    assert context_length(model) == 7
    with pytest.raises(InputError, match="vocabulary of 3"):
        check_windows(model, torch.tensor([[0, 3]]))


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), "cannot be scored"),
        (torch.zeros(3, 1, dtype=torch.int64), "cannot be scored"),
        (torch.zeros(8, dtype=torch.int64), "cannot be scored"),
        (torch.zeros(1, 33, dtype=torch.int64), "context of 32"),
        (torch.tensor([[1, 48]]), "Token id 48 .* vocabulary of 48"),
        (torch.tensor([[1, -1]]), "Token id -1"),
    ],
)
def test_windows_the_model_cannot_read(llama, windows: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_windows(llama(0), windows)
    check_windows(llama(0), torch.full((1, 32), 47))

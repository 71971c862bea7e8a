"""Pico models made from a config, and windows for them."""

from collections.abc import Callable

import pytest
import torch
from speaking import VOCABULARY, make_llama
from transformers import LlamaForCausalLM


@pytest.fixture
def llama() -> Callable[[int], LlamaForCausalLM]:
    return make_llama


@pytest.fixture(scope="session")
def windows() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))

"""What the integration tests share: one trained model, two texts, and every quantized folder made only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pico import save_pico
from trained import VOCABULARY, byte_tokenizer, save_trained
from transformers.utils import logging as hf_logging

from bitfloor import api
from bitfloor.data.offline import default_documents

Recipe = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No progress bars, and timings of runs in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFLOOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        hf_logging.disable_progress_bar()
        yield


@dataclass(frozen=True)
class Texts:
    """Two running texts without a paragraph in common: to calibrate on, and to score."""

    calibration: str
    evaluation: str


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    for role, count in (("calibration", 8_000), ("evaluation", 6_000)):
        # Joined from the end: the model was trained on the beginning of the calibration part.
        text = "\n\n".join(default_documents(role))[-count:]
        (folder / f"{role}.txt").write_text(text, encoding="utf-8")
    return Texts(f"{folder / 'calibration.txt'}:whole", str(folder / "evaluation.txt"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trained(tmp_path_factory.mktemp("trained") / "llama")


@pytest.fixture(scope="session")
def recipe(texts: Texts) -> Callable[..., Recipe]:
    """``recipe("gptq", 3)``: few sequences, an untouched embedding, groups of 32; keywords replace whole parts."""

    def make(method: str, bits: int, group_size: int = 32, **parts: Any) -> Recipe:
        name, _, chosen = method.partition("-")
        calibration = {"text": texts.calibration, "sequences": 16, "seqlen": 128}
        return {
            "method": {"name": name, "range": chosen or "search"},
            "spec": {"bits": bits, "group_size": group_size},
            "embedding": {"bits": 16},
            "calibration": calibration,
            **parts,
        }

    return make


@pytest.fixture(scope="session")
def quantized(
    trained: Path, recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """The trained model under ``recipe(method, bits)``; tests must not change the folder."""
    made: dict[tuple[str, int], Path] = {}
    root = tmp_path_factory.mktemp("quantized")

    def make(method: str, bits: int) -> Path:
        key = (method, bits)
        if key not in made:
            made[key] = root / f"{method}-{bits}"
            api.quantize(trained, made[key], recipe(method, bits))
        return made[key]

    return make


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of random pico models with a tokenizer, each made once."""
    made: dict[str, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        key = f"{name} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            made[key] = save_pico(folder, name, vocab_size=VOCABULARY, **changes)
            byte_tokenizer().save_pretrained(folder)
        return made[key]

    return make


@pytest.fixture
def small(texts: Texts) -> Recipe:
    """GPTQ at 3 bits on four short sequences, an 8-bit embedding: every part of the pipeline in half a second."""
    return {
        "name": "small",
        "method": {"name": "gptq", "range": "minmax"},
        "spec": {"bits": 3, "group_size": 32},
        "embedding": {"bits": 8, "group_size": 32},
        "calibration": {"text": texts.calibration, "sequences": 4, "seqlen": 32, "batch_size": 2},
    }


@pytest.fixture
def learned(texts: Any) -> Callable[..., dict[str, Any]]:
    """``learned("signround", bits=2, steps=3)``: four short sequences, an untouched embedding."""

    def make(method: str, bits: int = 3, **options: Any) -> dict[str, Any]:
        return {
            "name": "learned",
            "method": {"name": method, **options},
            "spec": {"bits": bits, "group_size": 32},
            "embedding": {"bits": 16},
            "calibration": {"text": texts.calibration, "sequences": 4, "seqlen": 32, "batch_size": 2},
        }

    return make

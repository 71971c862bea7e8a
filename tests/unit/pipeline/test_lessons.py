"""What a restoration reads, and which matrices it adapts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitfloor.core.errors import InputError
from bitfloor.core.spec import MatrixRef, QuantSpec
from bitfloor.data.sources import make_source
from bitfloor.data.tokenize import calibration_batches
from bitfloor.pipeline.job import Assignment
from bitfloor.pipeline.lessons import Lessons, RestoreConfig, find_targets, make_lessons
from bitfloor.pipeline.restore import rate_of


class Letters:
    """One token a letter."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> Any:
        return {"input_ids": [ord(letter) for letter in text]}


def text(letters: int, start: int = 1) -> str:
    """No stretch of it occurs twice."""
    return "".join(chr(start + i) for i in range(letters))


def rows(lessons: Lessons) -> list[list[int]]:
    return [*lessons.train.tolist(), *lessons.held.tolist()]


def test_counts_are_whole_updates() -> None:
    config = RestoreConfig(tokens=1000, seqlen=30, batch_size=2, accumulation=4, passes=3, held_out=0.1)
    assert (config.updates, config.sequences, config.distinct, config.judged) == (4, 32, 11, 1)
    assert RestoreConfig(tokens=239, seqlen=30, batch_size=2, accumulation=4).updates == 0


def test_windows_of_a_running_text_are_none_of_the_calibrations() -> None:
    source = make_source("a", [text(2000)], running=True)
    seen = calibration_batches(Letters(), source, sequences=3, seqlen=50, batch_size=2)
    config = RestoreConfig(tokens=480, seqlen=20, accumulation=1, held_out=0.25)
    found = make_lessons(config, Letters(), source, seen, min_chars=0, pack=None)
    assert found.train.shape == (24, 20) and found.held.shape == (6, 20)
    calibrates = {token for batch in seen for row in batch.tolist() for token in row}
    # Windows overlap by less than what is recognised, here a whole window.
    assert all(len(set(row) & calibrates) < 20 for row in rows(found))
    firsts = sorted(row[0] for row in rows(found))
    assert len(set(firsts)) == 30 and firsts[0] < 200 and firsts[-1] > 1800  # of all parts of the text
    held = sorted(row[0] for row in found.held.tolist())
    assert held[0] < 400 and held[-1] > 1600
    assert found.sha256() != make_lessons(config, Letters(), source, [], min_chars=0, pack=None).sha256()


def test_documents_give_their_beginnings_and_those_that_calibrate_are_left_out() -> None:
    documents = [text(40 + 5 * i, 1 + 300 * i) for i in range(12)]
    source = make_source("a", documents)
    seen = calibration_batches(Letters(), source, sequences=3, seqlen=60, batch_size=2, min_chars=0)
    assert [row[0] for batch in seen for row in batch.tolist()] == [1 + 300 * i for i in (4, 5, 6)]
    config = RestoreConfig(tokens=180, seqlen=45, accumulation=1, held_out=0.5)
    found = make_lessons(config, Letters(), source, seen, min_chars=0, pack=None)
    assert sorted(row[0] for row in rows(found)) == [1 + 300 * i for i in (1, 2, 3, 7, 8, 9)]
    with pytest.raises(InputError, match="a is too short for restore.tokens = 450: 10 sequences of 45"):
        many = RestoreConfig(tokens=450, seqlen=45, accumulation=1)
        make_lessons(many, Letters(), source, seen, min_chars=0, pack=None)
    with pytest.raises(InputError, match="fewer tokens, .* or read it as one running text \\(restore.mode=packed\\)"):
        make_lessons(many, Letters(), source, seen, min_chars=0, pack=None)
    assert len(make_lessons(many, Letters(), source, seen, min_chars=0, pack=True).train) == 10


def test_what_a_short_text_would_need_is_said_and_is_enough() -> None:
    source = make_source("a", [text(200)], running=True)
    config = RestoreConfig(tokens=600, seqlen=10, accumulation=1, held_out=0.2)
    with pytest.raises(InputError, match=r"it has 20.*\(restore.passes=4\)"):
        make_lessons(config, Letters(), source, [], min_chars=0, pack=None)
    found = make_lessons(RestoreConfig(**{**vars(config), "passes": 4}), Letters(), source, [], min_chars=0, pack=None)
    assert len(found.train) == 15 and len(found.held) == 3
    with pytest.raises(InputError, match="restore.passes=5"):
        seen = calibration_batches(Letters(), source, sequences=4, seqlen=10, batch_size=4)
        make_lessons(config, Letters(), source, seen, min_chars=0, pack=None)


def assignment(*names: str, kind: str = "linear", kept: tuple[str, ...] = ()) -> Assignment:
    refs = {name: MatrixRef(name, f"{name}.weight", (4, 4), 0, kind) for name in names}
    specs = {name: QuantSpec(2, 4) for name in names if name not in kept}
    return Assignment(specs, dict.fromkeys(kept, "why"), refs, False)


def test_output_projections_of_attention_are_left_out_by_default() -> None:
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "a.self_attn.o_proj", "a.self_attn.q_proj", "a.attention.dense"]
    names += ["a.mlp.dense_h_to_4h", "a.self_attn.out_proj", "b.self_attention.dense"]
    found = find_targets(RestoreConfig(), assignment(*names))
    assert [ref.name for ref in found.refs] == ["h.0.mlp.c_proj", "a.self_attn.q_proj", "a.mlp.dense_h_to_4h"]
    assert len(find_targets(RestoreConfig(leave=()), assignment(*names)).refs) == len(names)


def test_kept_matrices_and_experts_are_left_with_a_reason() -> None:
    found = find_targets(RestoreConfig(), assignment("a.q", "a.k", kept=("a.k",)))
    assert [ref.name for ref in found.refs] == ["a.q"] and found.left == {"a.k": "the recipe keeps it"}
    with pytest.raises(InputError, match="leaves no matrix to adapt .a.experts.0.up: experts are stacked"):
        find_targets(RestoreConfig(), assignment("a.experts.0.up", kind="expert"))
    with pytest.raises(InputError, match="'a.exp\\*', which asks for a.experts.0.up"):
        find_targets(RestoreConfig(targets=("a.exp*",)), assignment("a.experts.0.up", kind="expert"))


def test_the_rate_rises_and_falls_along_a_cosine() -> None:
    config = RestoreConfig(tokens=100, seqlen=10, accumulation=1, rate=0.4, warmup=0.2)
    assert [rate_of(config, t) for t in range(2)] == pytest.approx([0.2, 0.4])
    falling = torch.tensor([rate_of(config, t) for t in range(2, 10)])
    # Torch's own, of as many steps.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for value in falling.tolist():
        assert value == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        schedule.step()

import os
import subprocess
import sys

import pytest

from bitfloor.core.errors import InputError
from bitfloor.data import offline
from bitfloor.data.sources import load_text


def paragraphs(text: str) -> set[str]:
    flat = (" ".join(p.split()) for p in text.split("\n\n"))
    return {p for p in flat if len(p) >= offline.MIN_REPEAT}


def test_enough_text_for_both_parts() -> None:
    # 128 x 2,048 and 20 x 2,048 tokens. English prose and code have at most 4 characters a token with vocabularies of
    # 32,000 and more, so these counts of characters suffice whatever the tokenizer.
    assert sum(map(len, offline.default_documents("calibration"))) > 4 * 128 * 2048
    assert sum(map(len, offline.default_documents("evaluation"))) > 4 * 20 * 2048


def test_parts_are_disjoint_and_nothing_is_said_twice() -> None:
    calibration, evaluation = (offline.default_documents(role) for role in ("calibration", "evaluation"))
    ours = [paragraphs(text) for text in calibration]
    theirs = [paragraphs(text) for text in evaluation]
    assert not set().union(*ours) & set().union(*theirs)
    assert sum(map(len, ours)) == len(set().union(*ours))


def test_a_package_stays_on_one_side() -> None:
    assert len({offline.is_held_out(f"library/asyncio/{m}.py") for m in ("tasks", "locks", "events", "queues")}) == 1


def test_same_text_in_another_process() -> None:
    # Set order and directory order differ between processes; the text must not.
    here = load_text("default", "evaluation")
    code = "from bitfloor.data.sources import load_text; print(load_text('default', 'evaluation').sha256)"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == here.sha256
    assert here.name == f"default ({offline.python_series()}, evaluation)"
    assert here.running


def test_prose_is_unwrapped_and_code_is_not() -> None:
    text = "Title\n*****\n\nOne line\nand the next.\n\n>>> a = 1\n>>> b\n\n* item\n* item"
    expected = ["Title", "One line and the next.", ">>> a = 1\n>>> b", "* item\n* item"]
    assert list(offline._new_paragraphs(text, set())) == expected


@pytest.mark.parametrize("missing", ["pydoc_data.topics", "library"])
def test_an_installation_without_the_text(tmp_path, monkeypatch, missing: str) -> None:
    offline._corpus.cache_clear()
    if missing == "library":
        monkeypatch.setattr(offline.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match="does not hold; give a text file"):
        offline.default_documents("calibration")
    offline._corpus.cache_clear()


def test_a_damaged_library_file_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "json.py").write_bytes(b"def broken(:\n")
    monkeypatch.setattr(offline.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    offline._corpus.cache_clear()
    with pytest.raises(InputError, match=r"json\.py"):
        offline.default_documents("calibration")
    offline._corpus.cache_clear()

import sys
from types import SimpleNamespace

import pytest

from bitfloor.core.errors import InputError
from bitfloor.data import hub


def install(monkeypatch, load) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_missing_package_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        hub.load_hub_rows("org/set", None, "train", "text")


def test_rows_are_streamed_and_bounded(monkeypatch) -> None:
    asked = []

    def load(name, config, **options):
        asked.append((name, config, options))
        return ({"text": f"row {i}"} for i in range(10**9))

    install(monkeypatch, load)
    monkeypatch.setattr(hub, "MAX_ROWS", 3)
    assert hub.load_hub_rows("org/set", "conf", "test", "text") == ["row 0", "row 1", "row 2"]
    assert asked == [("org/set", "conf", {"split": "test", "streaming": True})]


def test_no_network_is_one_sentence(monkeypatch) -> None:
    def load(*args, **options):
        raise ConnectionError("cannot reach the hub\nand a long trace")

    install(monkeypatch, load)
    message = r"hf:org/set:train .*ConnectionError: cannot reach the hub\).*network"
    with pytest.raises(InputError, match=message) as caught:
        hub.load_hub_rows("org/set", None, "train", "text")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "a", "id": 1}], "fields there: body, id"),
        ([{"text": "a"}, {"text": None}], "row 1: .* null"),
        ([], "no rows"),
    ],
)
def test_wrong_rows(monkeypatch, rows, message: str) -> None:
    install(monkeypatch, lambda *args, **options: rows)
    with pytest.raises(InputError, match=message):
        hub.load_hub_rows("org/set", None, "train", "text")

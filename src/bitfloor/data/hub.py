"""Text from a hub data set: the one place that imports the optional ``datasets`` package."""

from __future__ import annotations

from itertools import islice

from bitfloor.core.errors import InputError
from bitfloor.data.readers import check_field, text_rows

MAX_ROWS = 20_000
"""Rows read at most, streamed from the start of the split: web corpora have hundreds of millions."""


def load_hub_rows(name: str, config: str | None, split: str, field: str) -> list[str]:
    """The first ``MAX_ROWS`` values of one field of a hub data set's split.

    Raises:
        InputError: ``datasets`` is not installed, the data set, configuration or split cannot be had (with the
            library's reason), or the field is not there.
    """
    where = ":".join(["hf", name, *([config] if config else []), split])
    try:
        import datasets
    except ImportError:
        raise InputError(f"Reading {where} needs the datasets package; install it with: pip install datasets") from None
    try:
        rows = list(islice(datasets.load_dataset(name, config, split=split, streaming=True), MAX_ROWS))
    except Exception as error:  # the library and its network stack raise many unrelated kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{where} cannot be read ({type(error).__name__}: {reason}); check the name and the network, "
            "or give a local file."
        ) from error
    for row in rows[:1]:
        check_field(row, field, where)
    return text_rows((row.get(field) for row in rows), field, where)

"""``bitfloor migrate``: a folder of an older format version in the present one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfloor.cli.console import print_note
from bitfloor.core.errors import InputError


def migrate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of an earlier bitfloor quantize.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="Folder to write; new or empty.", show_default=False)
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Rewrite DIR itself, file by file; killed, it continues.")
    ] = False,
) -> None:
    """Write a folder of an older format version in the present one; its tensors stay as they are."""
    from bitfloor import api

    if in_place == (out is not None):
        raise InputError("give a folder to write to, or --in-place to rewrite the checkpoint itself, and not both.")
    done = api.migrate(folder, out)
    print_note(f"wrote {done['path']}: format version {done['from']} is now {done['to']}")

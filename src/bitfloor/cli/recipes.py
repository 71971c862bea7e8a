"""``bitfloor recipes``: list, show, copy and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfloor.cli.console import display, print_text, table
from bitfloor.core.errors import InputError

app = typer.Typer(help="List, show, copy and check recipes.", add_completion=False, invoke_without_command=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A preset; bitfloor recipes ls lists them.")]


@app.callback()
def default(context: typer.Context) -> None:
    """List, show, copy and check recipes. Without a subcommand: list."""
    if context.invoked_subcommand is None:
        ls()


@app.command()
def ls() -> None:
    """List the presets, one line each."""
    from bitfloor.recipe.catalog import presets

    rows = ((preset.name, preset.description) for preset in presets())
    display(table(("name", "what it does"), rows, left=2))


@app.command()
def show(name: Name) -> None:
    """Print the YAML of a preset."""
    from bitfloor.recipe.catalog import preset_text

    print_text(preset_text(name).rstrip("\n"))


@app.command()
def cp(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write the copy; must not exist.")],
) -> None:
    """Copy a preset to a file of your own, to edit and pass to --recipe."""
    from bitfloor.recipe.catalog import preset_text

    text = preset_text(name)
    if file.is_dir():
        file = file / f"{name}.yaml"
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise InputError(f"{file} exists already; choose another name or remove it first.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; choose another place.") from error
    print_text(f"wrote {file}")


@app.command()
def validate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file, or the name of a preset.")],
) -> None:
    """Check a recipe completely and print it with every default filled in."""
    from bitfloor.recipe.load import dump_recipe, load_recipe

    recipe = load_recipe(file)
    print_text(f"# {file} is valid; sha256 {recipe.sha256()}\n{dump_recipe(recipe)}".rstrip("\n"))

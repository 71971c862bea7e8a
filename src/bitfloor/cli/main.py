"""The command ``bitfloor``: assembles the commands and turns every way of failing into a sentence and an exit code.

    0    done                           130  interrupted; the same command continues
    1    the run failed                 141  whoever read the output closed the pipe
    2    wrong usage or wrong input

Typer's own ``main`` is not used: it has its own ideas of each of these.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from bitfloor.cli.allocate import allocate
from bitfloor.cli.bench import bench
from bitfloor.cli.chat import chat
from bitfloor.cli.console import PipeClosed, own_warnings, print_error, print_text
from bitfloor.cli.environment import env
from bitfloor.cli.evaluate import evaluate, export
from bitfloor.cli.generate import generate
from bitfloor.cli.inspect import inspect
from bitfloor.cli.migrate import migrate
from bitfloor.cli.quantize import plan, quantize
from bitfloor.cli.recipes import app as recipes
from bitfloor.cli.serve import serve
from bitfloor.core.errors import BitfloorError

PROGRAM = "bitfloor"
FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
DEBUG = "--debug"

app = typer.Typer(
    name=PROGRAM,
    help="Quantize language models to 4 bits and below, measure what it cost, and run them packed.",
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("inspect")(inspect)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("export")(export)
app.command("migrate")(migrate)
app.command("bench")(bench)
app.add_typer(recipes, name="recipes")
app.command("plan")(plan)
app.command("allocate")(allocate)
app.command("env")(env)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Quantize language models to 4 bits and below, measure what it cost, and run them packed."""
    del debug  # taken out of the arguments by `main`, declared here for --help
    if version:
        from importlib.metadata import version as installed

        print_text(f"{PROGRAM} {installed(PROGRAM)}")
        raise typer.Exit(0)


def run() -> None:
    """Entry point of the installed script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code.
    """
    _quiet_libraries()
    debug = DEBUG in arguments
    rest = [argument for argument in arguments if argument != DEBUG] or ["--help"]
    try:
        with own_warnings():
            code = _execute(rest)
        sys.stdout.flush()
        return code
    except (BrokenPipeError, PipeClosed):
        # The interpreter flushes stdout once more when it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted.")
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)


def _quiet_libraries() -> None:
    """Keep what other packages print out of ours; what is set by the user stays. Read when they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _execute(arguments: list[str]) -> int:
    command = get_command(app)
    try:
        with command.make_context(PROGRAM, list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    return 0


def _report(error: Exception) -> int:
    """Print the sentence for an exception; the exit code it stands for."""
    if isinstance(error, BitfloorError):
        print_error(str(error))
        return error.exit_code
    usage = getattr(error, "format_message", None)  # every usage error of typer has one, whatever its class is called
    if usage is not None:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else PROGRAM
        said = usage().rstrip(".")
        print_error(f"{said} See {where} --help." if said.endswith("?") else f"{said}; see {where} --help.")
        return USAGE
    if isinstance(error, MemoryError):
        print_error("out of memory; see bitfloor plan for what the run needs, and --spill to need less.")
        return FAILED
    text = " ".join(str(error).split())
    print_error(f"unexpected {type(error).__name__}: {text or 'no message'}; add {DEBUG} to see where it happened.")
    return FAILED

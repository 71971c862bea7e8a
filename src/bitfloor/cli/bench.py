"""``bitfloor bench``: how fast a packed model runs here, or what the kernels reach by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitfloor.cli.console import display, in_bytes, pairs, print_json, print_note, table
from bitfloor.core.errors import InputError

KERNELS = "kernels"
NAMES = {"float": "packed, float", "int8": "packed, int8", "half": "half precision"}


def bench(
    what: Annotated[
        str, typer.Argument(metavar="DIR|kernels", help="Output folder of bitfloor quantize, or the word kernels.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="MODEL", help="Float model to compare with, instead of random weights."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Read at once.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", min=1, help="Read one by one.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="The best of so many counts.")] = 3,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, max=1024, help="Threads to use.", show_default="torch's"),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", min=0.0, help="kernels: for every case.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/cli.md has the schema).")] = False,
) -> None:
    """Measure tokens a second and the share of the memory's speed, beside half precision."""
    from bitfloor import benching

    if what == KERNELS:
        if baseline is not None:
            raise InputError("--baseline is a model to compare a model with; bench kernels compares matrices.")
        found = benching.bench_kernels(threads=threads, seconds=seconds, rounds=rounds, say=print_note)
    else:
        found = benching.bench(
            Path(what),
            baseline=baseline,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            say=print_note,
        )
    if as_json:
        print_json(found)
    elif what == KERNELS:
        _show_kernels(found)
    else:
        _show_model(found)


def _show_model(found: dict[str, Any]) -> None:
    headings = ["", "weights", "prefill", "decode", "bytes/token", "GB/s", "of plain read", "decode, times half"]
    display(table(headings, (_run_row(run) for run in found["runs"])))
    kernels = found["instruction_set"] or "none"
    read = found["read_gb_s"]
    rows = [
        ("tokens", f"{found['prompt_tokens']} at once, then {found['new_tokens']} one by one; tokens a second"),
        ("rounds", f"best of {found['rounds']}, {_threads(found['threads'])}"),
        ("plain read", "-" if read is None else f"{read:.1f} GB/s"),
        ("packed by", f"{found['runs'][0]['decoder']}, kernels: {kernels}"),
        ("half precision", f"by transformers, {found['baseline']}"),
    ]
    rows += [(f"left out: {NAMES[name]}", reason) for name, reason in found["skipped"].items()]
    display(pairs(rows))


def _run_row(run: dict[str, Any]) -> list[str]:
    return [
        f"{NAMES[run['name']]} ({run['dtype']})",
        in_bytes(run["weight_bytes"]),
        f"{run['prefill_tokens_s']:,.1f}",
        f"{run['decode_tokens_s']:,.1f}",
        in_bytes(run["bytes_per_token"]),
        f"{run['gb_s']:.2f}",
        _percent(run["share_of_read"]),
        "-" if run["times_half"] is None else f"{run['times_half']:.2f}x",
    ]


def _show_kernels(found: dict[str, Any]) -> None:
    headings = ["case", "threads", "plain read", "int8", "of read", "float", "of read", "float, of bfloat16"]
    display(table(headings, (_kernel_row(run) for run in found["runs"])))
    rows = [
        ("matrices", " x ".join(map(str, found["shape"])) + ", one row of x; GB/s from main memory"),
        ("rounds", f"best of {found['rounds']}"),
        ("kernels", found["instruction_set"]),
        ("huge pages", "asked for" if found["huge_pages"] else "not to be had"),
    ]
    display(pairs(rows))


def _kernel_row(run: dict[str, Any]) -> list[str]:
    paths = [(f"{run[mode]['gb_s']:.1f}", _percent(run[mode]["share_of_read"])) for mode in ("int8", "float")]
    times = f"{run['float']['times_bfloat16']:.1f}x"
    return [run["case"], str(run["threads"]), f"{run['read_gb_s']:.1f}", *paths[0], *paths[1], times]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"

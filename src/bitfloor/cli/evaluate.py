"""``bitfloor eval`` and ``export``: what can be done with a model or a quantized folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfloor.cli.console import display, in_bytes, in_short, print_json, print_note, table
from bitfloor.cli.progress import watching
from bitfloor.cli.quantize import Device, TrustRemoteCode

NOT_WORSE = 0.01  # nats a token; the margin of evaluation.paired, repeated here because that module imports torch

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of bitfloor quantize.")]


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|DIR", help="A model, or an output folder of quantize.")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            "--perplexity",
            metavar="SPEC",
            help="Text to score, as for --calib; may be repeated.",
            show_default="default",
        ),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", metavar="N", help="Windows of each text.")] = 20,
    seqlen: Annotated[int, typer.Option("--seqlen", metavar="L", help="Tokens in a window.")] = 2048,
    baseline: Annotated[
        str | None, typer.Option("--baseline", metavar="MODEL", help="Model to compare with, on the same windows.")
    ] = None,
    divergence: Annotated[
        bool, typer.Option("--divergence", help="Also KL divergence and top-1 agreement; needs --baseline.")
    ] = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/cli.md has the schema).")] = False,
) -> None:
    """Measure perplexity, also against a baseline.

    With --baseline: the difference in log-loss on the same windows, with its 95% interval.
    """
    from bitfloor import api

    with watching() as progress:
        result = api.evaluate(
            model,
            perplexity=tuple(perplexity or ("default",)),
            windows=windows,
            seqlen=seqlen,
            baseline=baseline,
            device=device,
            divergence=divergence,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json(result)
        return
    headings = ["text", "perplexity", "windows", "seqlen", "tokens"]
    headings += ["baseline", "delta nll", "95% interval", "verdict"] if baseline else []
    headings += ["KL", "top-1 agreement"] if divergence else []
    display(table(headings, (_score_row(entry) for entry in result["perplexity"])))


def _score_row(entry: Mapping[str, Any]) -> list[str]:
    row = [entry["text"], f"{entry['value']:.3f}", str(entry["windows"]), str(entry["seqlen"]), f"{entry['tokens']:,}"]
    against, apart = entry["vs_baseline"], entry.get("divergence")
    if against is not None:
        interval = against["ci95"]
        between = f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "-"
        baseline = entry["value"] * math.exp(-against["delta_nll"])
        row += [f"{baseline:.3f}", f"{against['delta_nll']:+.4f}", between, verdict(interval)]
    if apart is not None:
        row += [in_short(apart["kl"], 4), f"{100 * apart['top1_agreement']:.2f}%"]
    return row


def verdict(interval: list[float] | tuple[float, float] | None) -> str:
    """What an interval of the difference in log-loss allows to be said.

    Args:
        interval: lower and upper end in nats a token, or None when there is none.
    """
    if not interval:
        return "no interval"
    low, high = interval
    if high < 0:
        return "better"
    if high < NOT_WORSE:
        return "not worse"
    return "worse" if low > 0 else "undecided"


def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new or empty.")],
    format: Annotated[str, typer.Option("--format", metavar="NAME", help="dense: an ordinary 16-bit model.")] = "dense",
) -> None:
    """Write a quantized folder in another format."""
    from bitfloor import api

    report = api.export(folder, out, format=format)
    nbytes = report.get("bytes")
    size = f", {in_bytes(nbytes)}" if isinstance(nbytes, int) else ""
    print_note(f"wrote {out} ({format}{size})")

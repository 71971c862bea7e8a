"""What SBA's incremental search costs, beside a sweep that multiplies every candidate anew; both must choose alike.

    python bench/sba.py

One matrix of random weights with groups of 128 columns, 32 of them, and inputs with channels of unlike size. Both read
the same tokens and the same three rounded copies of the matrix, and compute divergences by the same function; the full
sweep puts the candidate's columns together once and multiplies all tokens with them. Rounds alternate; CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record

BITS, GROUP = 2, 128


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "sba.json", help="the result")
    return parser.parse_args(argv)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returned."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def main() -> None:
    """Alternate both, check that they choose alike, write the result."""
    import torch

    from bitfloor.core.affine import decode, encode
    from bitfloor.core.spec import QuantSpec
    from bitfloor.solvers.ranges import minmax_grid
    from bitfloor.solvers.salience import group_salience, removal_costs
    from bitfloor.solvers.slim_bits import ROWS, Sweep, candidates, divergence, widths_of

    args = arguments()
    columns = args.groups * GROUP
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(columns, generator=generator).exp()
    x = torch.randn(args.tokens, columns, generator=generator) * size / columns**0.5
    weight = torch.randn(args.rows, columns, generator=generator)
    salience = group_salience(weight, removal_costs(x.T @ x), GROUP)
    tried = candidates(args.groups, False)
    copies = {}
    for step in (-1, 0, 1):
        grid = minmax_grid(weight, QuantSpec(BITS + step, GROUP))
        copies[step] = decode(encode(weight, grid), grid)

    def incremental() -> tuple[int, dict[int, float]]:
        sweep = Sweep(weight, copies.__getitem__, salience, GROUP, tried)
        sweep.add(x)
        return sweep.best(), sweep.loss

    def full() -> tuple[int, dict[int, float]]:
        aims = [rows @ weight.T for rows in torch.split(x, ROWS)]
        loss = {}
        for p in tried:
            widths = torch.tensor(widths_of(salience, BITS, p)).repeat_interleave(GROUP) - BITS
            whole = torch.where(widths == 0, copies[0], torch.where(widths < 0, copies[-1], copies[1]))
            loss[p] = sum(divergence(rows @ whole.T, aim) for rows, aim in zip(torch.split(x, ROWS), aims, strict=True))
        return min(loss, key=loss.__getitem__), loss

    seconds: dict[str, list[float]] = {"incremental": [], "full": []}
    chosen = set()
    worst = 0.0
    for _ in range(args.rounds):
        took, (best, loss) = timed(incremental)
        seconds["incremental"].append(round(took, 3))
        took, (other, exact) = timed(full)
        seconds["full"].append(round(took, 3))
        chosen |= {best, other}
        worst = max(worst, *(abs(loss[p] / exact[p] - 1) for p in tried))
        sys.stdout.write(
            f"{seconds['incremental'][-1]:.2f} s against {seconds['full'][-1]:.2f} s, p = {best} and {other}\n"
        )
    if len(chosen) != 1:
        raise SystemExit(f"the two choose differently: {sorted(chosen)}")
    ratio = statistics.median(seconds["incremental"]) / statistics.median(seconds["full"])
    parts = ("solvers/slim_bits.py", "solvers/salience.py")
    shape = {"rows": args.rows, "columns": columns, "groups": args.groups, "tokens": args.tokens}
    content = {**shape, "promoted": chosen.pop(), "cpu_seconds": seconds, "ratio": round(ratio, 3)}
    record.write_result(args.out, {**record.header(parts), **content, "largest_difference": worst})
    sys.stdout.write(f"ratio {ratio:.3f}\n")


if __name__ == "__main__":
    main()

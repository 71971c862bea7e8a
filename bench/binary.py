"""A binarization to compare with: BiLLM (arXiv 2402.04291) as dense weights, and the bytes that its parts would take.

    python bench/binary.py --model DIR --work DIR [--score]

What is implemented, for a matrix ``[O, I]`` in blocks of 128 columns, left to right:

    salience   w_ij^2 / U_jj^2, summed over the rows; U^T U is the inverse of the Hessian, damped by 1% of its mean
    salient    1 to 30 columns of largest salience of the block, as many as leave the least squared error; two sign
               planes, the second one of what the first leaves:  a1 sign(w) + a2 sign(w - a1 sign(w))
    others     one sign plane each for the small and the large ones:  a sign(w), the threshold a share of the block's
               largest weight, from 0.1 to 0.9 in 33 steps, that leaves the least squared error
    scales     the means of the magnitudes of a row's weights of that kind in the block, through float16
    errors     of a block are made up for by the columns behind it (GPTQ)

Simplified against the published code: no row means beside the scales (the paper's equations have none); a block's error
is compensated for exactly, ``(W - Q) U_BB^-1 U_BR``, where the code divides by the diagonal alone; the count of salient
columns is searched with the threshold of that count at a tenth of the steps, which is then searched in full. Blocks of
the model are quantized from what the quantized blocks before them give; calibration is the yardstick's.

Bits: a sign for every weight, a second one for the salient, one for which of the two groups another weight is in, a bit
a column for the mask, and four scales of 16 bits for every row and block. No program stores this; the weights are
written dense, as a folder that ``yardstick.py`` could score.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cost
import record
import torch
import yardstick
from torch import Tensor

BLOCK, MOST_SALIENT, DAMPING = 128, 30, 0.01
SHARES = tuple(0.1 + 0.025 * step for step in range(33))
COARSE = SHARES[::10]
SCALES, SCALE_BITS = 4, 16
NAME = "billm-like"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the binarized model")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--score", action="store_true", help="score it by the yardstick, and write the result")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "binary.json", help="the result")
    return parser.parse_args(argv)


# -- one matrix -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binarized:
    """A matrix as it would be stored.

    Args:
        dense: float32 ``[O, I]``.
        salient: bool ``[I]``, columns with two planes.
        planes: sign planes, uint8 ``[O, I]``: how many of every weight.
        split: weights that need a bit to say which group they are in.
        scales: numbers of 16 bits.
    """

    dense: Tensor
    salient: Tensor
    planes: Tensor
    split: int
    scales: int

    @property
    def bits(self) -> int:
        """All that must be stored: signs, the split, the mask of columns, scales."""
        return int(self.planes.sum()) + self.split + len(self.salient) + SCALE_BITS * self.scales


def formula(rows: int, columns: int, salient: int) -> int:
    """Bits of a matrix with so many salient columns; scales of all four kinds in every block."""
    signs = rows * (2 * salient + columns - salient)
    split, mask = rows * (columns - salient), columns
    return signs + split + mask + SCALE_BITS * SCALES * rows * -(-columns // BLOCK)


def plane(weight: Tensor, chosen: Tensor) -> Tensor:
    """``a sign(w)`` where chosen, else 0: ``a [O, 1]`` the mean magnitude of the chosen ones of a row, as float16.

    Args:
        weight: float32 ``[O, K]``.
        chosen: bool, of the same shape or one row of it.
    """
    chosen = chosen.expand_as(weight)
    size = weight.abs().mul(chosen).sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp_min(1)
    return torch.where(weight >= 0, 1.0, -1.0) * size.half().float() * chosen


def split_planes(weight: Tensor, others: Tensor, shares: Sequence[float]) -> tuple[Tensor, float]:
    """The columns that are not salient, by the best threshold: their weights, and the squared error left.

    Args:
        weight: float32 ``[O, K]``.
        others: bool ``[K]``.
        shares: thresholds to try, of the largest weight.
    """
    largest, best = float(weight[:, others].abs().max()) if bool(others.any()) else 0.0, None
    for share in shares:
        large = weight.abs() > share * largest
        made = plane(weight, others & ~large) + plane(weight, others & large)
        error = float((weight - made)[:, others].square().sum())
        if best is None or error < best[1]:
            best = made, error
    assert best is not None
    return best


def salient_planes(weight: Tensor, salient: Tensor) -> tuple[Tensor, float]:
    """The salient columns in two planes, and the squared error left."""
    first = plane(weight, salient)
    made = first + plane(weight - first, salient)
    return made, float((weight - made)[:, salient].square().sum())


def binarize_block(weight: Tensor, salience: Tensor) -> tuple[Tensor, Tensor]:
    """A block of columns ``[O, K]``: its weights, and which columns are salient.

    Args:
        weight: float32 ``[O, K]``.
        salience: ``[K]``.
    """
    order = salience.argsort(descending=True, stable=True)
    best: tuple[float, Tensor] | None = None
    for count in range(1, min(MOST_SALIENT, weight.shape[1] - 1) + 1):
        salient = torch.zeros(weight.shape[1], dtype=torch.bool)
        salient[order[:count]] = True
        error = salient_planes(weight, salient)[1] + split_planes(weight, ~salient, COARSE)[1]
        if best is None or error < best[0]:
            best = error, salient
    assert best is not None
    salient = best[1]
    return salient_planes(weight, salient)[0] + split_planes(weight, ~salient, SHARES)[0], salient


def binarize(weight: Tensor, hessian: Tensor) -> Binarized:
    """A whole matrix.

    Args:
        weight: float32 ``[O, I]``; not changed.
        hessian: ``[I, I]``, ``X^T X`` of what enters it.
    """
    from bitfloor.core.linalg import inverse_factor

    factor = inverse_factor(hessian, DAMPING)[0].float()
    left, rows = weight.clone(), len(weight)
    masks = []
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        part, own = left[:, first:last], factor[first:last, first:last]
        made, salient = binarize_block(part, (part.square() / own.diagonal().square()).sum(0))
        off = torch.linalg.solve_triangular(own, part - made, upper=True, left=False)
        left[:, last:] -= off @ factor[first:last, last:]
        left[:, first:last] = made
        masks.append(salient)
    mask = torch.cat(masks)
    planes = torch.ones(weight.shape, dtype=torch.uint8)
    planes[:, mask] = 2
    return Binarized(left, mask, planes, rows * int((~mask).sum()), SCALES * rows * len(masks))


# -- a model ----------------------------------------------------------------------------------------------------------


def binarize_model(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Dense weights by parameter name, and bits, weights and salient columns in all."""
    from bitfloor.calib.block import BlockRunner
    from bitfloor.calib.capture import capture
    from bitfloor.calib.stats import HessianSum
    from bitfloor.data.sources import load_text
    from bitfloor.data.tokenize import calibration_batches
    from bitfloor.modeling.loader import open_source
    from bitfloor.runtime.load import load_tokenizer

    text = load_text(str(record.data_file(args.data, yardstick.CALIBRATION)), "calibration")
    options = {"sequences": yardstick.SEQUENCES, "seqlen": 256, "batch_size": 8, "min_chars": 1500, "pack": False}
    ids = calibration_batches(load_tokenizer(args.model), text, **options)
    source = open_source(args.model)
    source.load_outer(head=False)
    captured = capture(source.skeleton, source.map.blocks_path, ids)
    source.release_outer()
    xs, dense, told = list(captured.hidden), {}, {"bits": 0, "weights": 0, "salient": 0}
    for k in range(source.map.n_blocks):
        refs = {ref.name: ref for ref in source.map.block_matrices(k)}
        runner = BlockRunner(source.load_block(k), source.map.block_path(k), list(refs.values()), captured.calls[k])
        groups = runner.input_groups(xs[0])
        sums = {group[0]: HessianSum(refs[group[0]].shape[1]) for group in groups}
        runner.observe(xs, lambda name, x, sums=sums: sums[name].add(x), list(sums))
        made = {name: binarize(runner.weight(name), sums[group[0]].mean()) for group in groups for name in group}
        weights = {name: found.dense for name, found in made.items()}
        with torch.no_grad():
            replaced = runner.prepare(weights)
            xs = [runner.forward(x, i, replaced) for i, x in enumerate(xs)]
        for name, found in made.items():
            dense[refs[name].param] = found.dense.t().contiguous() if refs[name].transposed else found.dense
            for key, value in (("bits", found.bits), ("weights", found.dense.numel())):
                told[key] += value
            told["salient"] += int(found.salient.sum())
        source.release_block(k)
        yardstick.say(f"  block {k}: {told['bits'] / told['weights']:.4f} bits a weight so far")
    return dense, told


def write_folder(model: Path, out: Path, dense: Mapping[str, Tensor]) -> None:
    """A copy of a model's folder with other weights in some places.

    Raises:
        SystemExit: a weight has no place.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    left = dict(dense)
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in tensors.keys() & left.keys():
            tensors[name] = left.pop(name).to(tensors[name].dtype).contiguous()
        save_file(tensors, out / path.name, {"format": "pt"})
    if left:
        raise SystemExit(f"{sorted(left)[0]} is not in the files of {model.name}")


def main() -> None:
    """Binarize, write the folder, score it."""
    args = arguments()
    out = args.work / NAME
    head = record.header(("core", "calib", "data", "evaluation/perplexity.py"))
    began = cost.cpu_seconds()
    with torch.no_grad():
        dense, told = binarize_model(args)
    spent = round(cost.cpu_seconds() - began, 1)
    write_folder(args.model, out, dense)
    del dense
    bits = told["bits"] / told["weights"]
    sys.stdout.write(f"{out}: {bits:.4f} bits a linear weight\n")
    if args.score:
        sizes = {**told, "bits_per_linear_weight": bits, "quantization": {"cpu_seconds": spent}}
        content = {**head, "name": NAME, "settings": yardstick.settings_of(args), **sizes}
        record.write_result(args.out, {**content, **yardstick.score(out, args)})


if __name__ == "__main__":
    main()

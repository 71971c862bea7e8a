"""One matrix at a time against llama.cpp's smallest types: output error of PTQ1.61, IQ1_S and IQ1_M, at counted bytes.

    python bench/iq1.py --model DIR --work DIR --peer-python V/bin/python [--checkpoint DIR ...]

The matrices are the down projections of some blocks, whose rows are multiples of 256 as llama.cpp's types need them.
Each is quantized alone, from what enters it in the float model on the calibration text: PTQ1.61 chooses its channels by
that, IQ1_S and IQ1_M weigh every column by its mean square (the importance matrix of llama.cpp, which is just that).
The float model's inputs on text that calibrated neither then give

    error = |X (W - W')^T|^2 / |X W^T|^2

once over all tokens and once without the first of every sequence, which is far louder than the others in some blocks.
``--checkpoint`` adds the same matrices of a quantized model, read by ``bitfloor.load``.

Bytes are of the whole matrix, by part for ours; llama.cpp's are what its encoder says it wrote.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablation
import record

PRESET = "ptq161"
GAIN = ("method.score=gain", "method.range=search")
# Name, changes to the preset; learning is of this matrix alone.
VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("PTQ1.61, start", ("method.steps=0",)),
    ("PTQ1.61, start, mask by gain", ("method.steps=0", "method.score=gain")),
    ("PTQ1.61, start, mask by gain, searched range", ("method.steps=0", *GAIN)),
)
OWN = "bitfloor-1.61"
OWN_LABEL = "bitfloor, {bits} stored bits, GPTQ"
BUDGETS = (1.5625, 1.61, 1.75)  # what IQ1_S takes, what the preset does, what IQ1_M takes
LEARNED = "PTQ1.61, mask by gain, searched range, {steps} steps"
TYPES = ("IQ1_S", "IQ1_M")
SEQUENCES, UNSEEN, SEQLEN, BATCH = 128, 32, 256, 4
TEXTS = ("c4", "wiki")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the peer reads and writes")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--peer-python", type=Path, required=True, help="interpreter with xllamacpp and gguf")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="a quantized model; repeatable")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 12, 20, 27])
    parser.add_argument("--matrix", default="mlp.down_proj", help="which one of every block")
    parser.add_argument("--steps", type=int, default=0, help="also learn so many steps a matrix")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "iq1.json", help="the result")
    return parser.parse_args(argv)


@dataclass
class Products:
    """``X^T X`` of a matrix's inputs, float32 ``[I, I]``, with and without the first token of every sequence."""

    every: Any
    behind: Any


@dataclass
class Matrix:
    """One matrix of the float model, what entered it, and what was made of it.

    Args:
        name: public name.
        weight: float32 ``[O, I]``.
        moments: float32 ``[I]``, mean squared input on the calibration text.
        products: by unseen text.
        made: ``(name, dense weights, bytes, bytes by part, CPU seconds)``.
    """

    name: str
    weight: Any
    moments: Any
    products: dict[str, Products]
    made: list[tuple[str, Any, int, dict[str, int], float | None]]


def load_ids(args: argparse.Namespace) -> tuple[list[Any], dict[str, range]]:
    """Batches of token ids, and which of them are of which text."""
    import torch

    from bitfloor.data.sources import load_text
    from bitfloor.data.tokenize import calibration_batches, evaluation_windows
    from bitfloor.runtime.load import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    c4 = load_text(str(record.data_file(args.data, ablation.CALIBRATION)), "calibration")
    count = SEQUENCES + UNSEEN
    read = calibration_batches(tokenizer, c4, sequences=count, seqlen=SEQLEN, batch_size=BATCH, pack=False)
    documents = torch.cat(read)
    wiki = load_text(f"{record.data_file(args.data, ablation.VALIDATION)}:whole", "evaluation")
    ids = [*documents.split(BATCH), *evaluation_windows(tokenizer, wiki, windows=UNSEEN, seqlen=SEQLEN).split(BATCH)]
    first, second = SEQUENCES // BATCH, (SEQUENCES + UNSEEN) // BATCH
    return ids, {"calibration": range(first), "c4": range(first, second), "wiki": range(second, len(ids))}


def look(runner: Any, name: str, xs: Sequence[Any], texts: Mapping[str, range]) -> tuple[Any, dict[str, Products]]:
    """Mean squares of a matrix's inputs where they calibrate, products where they do not."""
    import torch

    columns = runner.weight(name).shape[1]
    squares, rows = torch.zeros(columns, dtype=torch.float64), 0
    found = {text: Products(*(torch.zeros(columns, columns) for _ in range(2))) for text in TEXTS}
    of = {batch: text for text, batches in texts.items() for batch in batches}
    seen = iter(range(len(xs)))

    def add(_: str, x: Any) -> None:
        nonlocal rows
        text = of[next(seen)]
        if text == "calibration":
            squares.add_(x.double().square().sum(0))
            rows += len(x)
            return
        behind = x.float().reshape(-1, SEQLEN, columns)[:, 1:].reshape(-1, columns)
        first = x.float().reshape(-1, SEQLEN, columns)[:, 0]
        found[text].behind.addmm_(behind.T, behind)
        found[text].every.addmm_(first.T, first)

    runner.observe(xs, add, [name])
    for products in found.values():
        products.every += products.behind
    return (squares / rows).float(), found


def error(weight: Any, dense: Any, products: Any) -> float:
    """``|X (W - W')^T|^2 / |X W^T|^2`` from ``X^T X``."""
    off, exact, inner = (weight - dense).double(), weight.double(), products.double()
    return float(((off @ inner) * off).sum() / ((exact @ inner) * exact).sum())


def ours(source: Any, runner: Any, name: str, streams: tuple[list[Any], list[Any]], steps: int) -> list[Any]:
    """The matrix by the variants of PTQ1.61.

    Args:
        source, runner, name: the model, the block and the matrix.
        streams: inputs and outputs of the float block on the calibration text.
        steps: of the learned variant; 0 leaves it out.
    """
    import torch

    from bitfloor.core.packed import dequantize, nbytes
    from bitfloor.recipe.job import make_job
    from bitfloor.recipe.load import load_recipe

    learned = (LEARNED.format(steps=steps), (f"method.steps={steps}", *GAIN))
    inputs, targets = streams
    made = []
    for label, overrides in (*VARIANTS, *([learned] if steps else [])):
        job = make_job(load_recipe(PRESET, list(overrides)), source)
        began = time.process_time()
        with torch.no_grad():
            result = job.method.quantize_block(runner, inputs, {name: job.decide(name)[0]}, inputs, targets)
        weight = result.weights[name]
        parts = {part: size for part, size in nbytes(weight).items() if size}
        made.append((label, dequantize(weight), sum(parts.values()), parts, time.process_time() - began))
    return made


def by_budget(source: Any, runner: Any, name: str, xs: Sequence[Any]) -> list[Any]:
    """The matrix by the storage and the start of bitfloor-1.61, its own bits for a budget: no learning.

    Outputs count alike, and its inputs are the float model's, as for the others.
    """
    from dataclasses import replace

    import torch

    from bitfloor.calib.stats import HessianSum
    from bitfloor.core.affine import decode, pack
    from bitfloor.core.basis import Basis, by_size
    from bitfloor.core.packed import nbytes
    from bitfloor.methods.gptq import Shown, solve
    from bitfloor.pipeline.budget import item_of, search_of
    from bitfloor.pipeline.choice import within_budget
    from bitfloor.pipeline.survey import Stakes
    from bitfloor.recipe.job import make_job
    from bitfloor.recipe.load import load_recipe

    job = make_job(load_recipe(OWN, []), source)
    ref, weight = runner.ref(name), runner.weight(name).clone()
    total = HessianSum(weight.shape[1], weight.device)
    runner.observe(xs, lambda _, x: total.add(x), [name])
    spec = job.decide(name)[0]
    basis = Basis(by_size(total.total.diagonal()), spec.rotation)
    spec = replace(spec, channels=basis.channels)
    hessian, search, made = basis.both(total.total), search_of(job), []
    stakes = Stakes(torch.ones(weight.shape[0]), hessian / total.rows, total.rows, basis)
    for bits in BUDGETS:
        began = time.process_time()
        item = item_of(ref, spec, weight, stakes, replace(job.allocation, stored=bits), search)
        plan = item.options[int(within_budget([item], [item.costs()]).choice[0])]
        config = replace(search, sweeps=job.method.config.start.sweeps)
        solved, _ = solve(basis.to(weight), Shown(hessian, None, total.rows), replace(spec, widths=plan), config)
        parts = {part: size for part, size in nbytes(pack(solved.codes, solved.grid, basis)).items() if size}
        dense = basis.back(decode(solved.codes, solved.grid))
        made.append((OWN_LABEL.format(bits=bits), dense, sum(parts.values()), parts, time.process_time() - began))
    return made


def lead(args: argparse.Namespace) -> list[Matrix]:
    """Lead the text through the float model, and stop at every block that was asked for."""
    import torch

    from bitfloor.calib.block import BlockRunner
    from bitfloor.calib.capture import capture
    from bitfloor.modeling.loader import open_source

    ids, texts = load_ids(args)
    source = open_source(args.model)
    source.load_outer(head=False)
    captured = capture(source.skeleton, source.map.blocks_path, ids)
    source.release_outer()
    xs, found = list(captured.hidden), []
    for k in range(max(args.blocks) + 1):
        refs = source.map.block_matrices(k)
        runner = BlockRunner(source.load_block(k), source.map.block_path(k), refs, captured.calls[k])
        with torch.no_grad():
            outputs = [runner.forward(x, i) for i, x in enumerate(xs)]
        if k in args.blocks:
            name = next(ref.name for ref in refs if ref.name.endswith(args.matrix))
            moments, products = look(runner, name, xs, texts)
            count = len(texts["calibration"])
            made = ours(source, runner, name, (xs[:count], outputs[:count]), args.steps)
            with torch.no_grad():
                made += by_budget(source, runner, name, xs[:count])
            found.append(Matrix(name, runner.weight(name).clone(), moments, products, made))
            say(name)
        xs = outputs
        source.release_block(k)
    return found


def add_peer(matrices: Sequence[Matrix], args: argparse.Namespace) -> dict[str, Any]:
    """Put IQ1_S and IQ1_M of every matrix beside ours; the peer's versions."""
    from safetensors.torch import load_file, save_file

    given, back, told = (args.work / name for name in ("iq1-in.safetensors", "iq1-out.safetensors", "iq1.json"))
    tensors = {f"{matrix.name}.weight": matrix.weight.contiguous() for matrix in matrices}
    save_file({**tensors, **{f"{matrix.name}.importance": matrix.moments for matrix in matrices}}, given)
    script = Path(__file__).parent / "peers" / "iq1.py"
    line = [args.peer_python, script, "--input", given, "--output", back, "--out", told]
    subprocess.run([str(word) for word in line], check=True)
    dense, report = load_file(back), record.read_result(told)
    for matrix in matrices:
        for kind in TYPES:
            size = report["matrices"][matrix.name][kind]
            row = (kind, dense[f"{matrix.name}.{kind}"], size["bytes"], {"blocks": size["bytes"]}, size["cpu_seconds"])
            matrix.made.append(row)
    for path in (given, back, told):
        path.unlink()
    return report["versions"]


def add_checkpoint(matrices: Sequence[Matrix], folder: Path) -> None:
    """Put the same matrices of a quantized model beside ours.

    Raises:
        SystemExit: one of them is not packed there.
    """
    import torch

    from bitfloor import api
    from bitfloor.core.packed import nbytes

    model = api.load(folder, dtype=torch.float32)
    for matrix in matrices:
        module = model.get_submodule(matrix.name)
        if not hasattr(module, "packed"):
            raise SystemExit(f"{matrix.name} is not quantized in {folder.name}")
        parts = {part: size for part, size in nbytes(module.packed()).items() if size}
        matrix.made.append(
            (f"{folder.name}, whole model", module.dense(torch.float32), sum(parts.values()), parts, None)
        )


def rows_of(matrix: Matrix) -> list[dict[str, Any]]:
    """What was measured of one matrix: a row for everything that was made of it."""
    rows = []
    for name, dense, size, parts, seconds in matrix.made:
        row: dict[str, Any] = {"name": name, "bytes": size, "parts": parts}
        row["bits_per_weight"] = 8 * size / matrix.weight.numel()
        row["cpu_seconds"] = None if seconds is None else round(seconds, 2)
        for text, products in matrix.products.items():
            row[f"error_{text}"] = error(matrix.weight, dense, products.behind)
            row[f"error_{text}_every_token"] = error(matrix.weight, dense, products.every)
        say(f"{matrix.name} {json.dumps(row)}")
        rows.append(row)
    return rows


def say(text: str) -> None:
    """Progress goes to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> None:
    """Measure and write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    # The variants change what this recipe says; what none of them names is its own.
    recipe = {"preset": PRESET, "overrides": [], "calibration": None, "sha256": record.recipe_sha256(PRESET)}
    parts = dict.fromkeys((*record.quality(PRESET), *record.parts_of(OWN)))
    head = {**record.header(tuple(parts)), "recipe": recipe}
    matrices = lead(args)
    versions = add_peer(matrices, args)
    for folder in args.checkpoint:
        add_checkpoint(matrices, folder)
    about = {"model": args.model.resolve().name, "calibration": [SEQUENCES, SEQLEN], "unseen": [UNSEEN, SEQLEN]}
    found = [{"name": m.name, "shape": list(m.weight.shape), "rows": rows_of(m)} for m in matrices]
    record.write_result(args.out, {**head, **about, "peer_versions": versions, "matrices": found})


if __name__ == "__main__":
    main()

"""The table of mixed precision on a second model made to differ: a small GPT-2, trained here in a few minutes.

    python bench/second.py --work DIR [--rows NAME ...]

SmolLM2 is a Llama. This one has learned positions, layer norms with biases, one fused projection for query, key and
value stored transposed, GELU without a gate, and bytes for tokens; it learns Python's own documentation. Every row of
the table in docs/methods/slim-llm.md is made from it, calibrated on text of the kind it learned from and scored on text
it has not seen. Groups have 16 columns, so that a matrix has as many as in a large model.

One result, ``bench/results/second.json``; rows that are asked for again replace theirs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cost
import record
import yardstick

sys.path.insert(0, str(record.ROOT / "tests"))

CONTEXT, WIDTH, DEPTH, HEADS = 256, 128, 6, 4
STEPS, BATCH, LENGTH, RATE = 1500, 16, 128, 3e-3
SBA = "allocation.policy=sba"
BUDGET = ("allocation.policy=budget", "allocation.sort=true")
NONE = "allocation=null"
# Name in the table, preset without its width, changes.
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("RTN, min-max", "rtn-minmax", ()),
    ("GPTQ, min-max", "slim-llm", ("method.range=minmax", NONE)),
    ("GPTQ + SBA", "slim-llm", ("method.range=minmax",)),
    ("GPTQ + SQC", "slim-llm", (NONE,)),
    ("SliM-LLM", "slim-llm", ()),
    ("GPTQ, good ranges", "gptq", ()),
    ("OmniQuant", "omniquant", ()),
    ("SliM-LLM+", "slim-llm-plus", ()),
    ("SignRound", "signround", ()),
    ("SBA + SignRound", "signround", (SBA,)),
    ("bitfloor (p = 0)", "bitfloor", ("spec.rotation=16",)),
    ("slim-tuned", "slim-tuned", ("spec.rotation=16",)),
    ("budget + bitfloor", "bitfloor", ("spec.rotation=16", BUDGET[0])),
    ("budget, sorted + bitfloor", "bitfloor", ("spec.rotation=16", *BUDGET)),
)
WIDTHS = (2, 3)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and what is made of it")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "second.json", help="the result")
    parser.add_argument("--rows", nargs="*", help="names of rows; default: all")
    return parser.parse_args(argv)


def train(folder: Path) -> None:
    """Train the model, once."""
    import torch
    from trained import byte_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    from bitfloor.data.offline import default_documents

    tokenizer = byte_tokenizer()
    tokens = torch.tensor(tokenizer("\n\n".join(default_documents("calibration")), verbose=False)["input_ids"])
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        bos_token_id=256,
        eos_token_id=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
        batch = windows[torch.randint(len(windows), (BATCH,))]
        logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0 or step + 1 == STEPS:
            yardstick.say(f"  step {step}: {float(loss):.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def score(folder: Path) -> float:
    """Perplexity on the part of the text that was not learned."""
    from bitfloor import api

    found = api.evaluate(folder, perplexity=["default"], windows=80, seqlen=LENGTH)
    value: float = found["perplexity"][0]["value"]
    return value


def row(model: Path, name: str, bits: int, work: Path) -> dict[str, Any]:
    """Quantize and score one row of the table."""
    from bitfloor import api

    preset, changes = next((preset, changes) for own, preset, changes in ROWS if own == name)
    overrides = [
        "spec.group_size=16",
        "embedding.bits=16",
        "calibration.sequences=64",
        f"calibration.seqlen={LENGTH}",
        *changes,
    ]
    if preset not in ("rtn-minmax",):
        overrides.append("calibration.batch_size=4")
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    spent = cost.cpu_seconds()
    report = api.quantize(model, out, f"{preset}-w{bits}g64", overrides=overrides)
    spent = cost.cpu_seconds() - spent
    found = {
        "name": name,
        "bits": bits,
        "preset": f"{preset}-w{bits}g64",
        "overrides": overrides,
        "bits_per_linear_weight": report["bits_per_linear_weight"],
        "bytes": report["bytes"]["total"],
        "ppl": score(out),
        "cpu_seconds": round(spent, 1),
    }
    yardstick.say(f"{name}, {bits} bits: {found['ppl']:.3f} ({found['bits_per_linear_weight']:.3f} bits)")
    return found


def main() -> None:
    """Train if need be, then every row that was asked for."""
    args = arguments()
    model = args.work / "gpt2"
    if not (model / "config.json").is_file():
        yardstick.say("training")
        train(model)
    names = [name for name, _, _ in ROWS if args.rows is None or name in args.rows]
    old = record.read_result(args.out) if args.out.is_file() else {"rows": []}
    kept = [found for found in old["rows"] if found["name"] not in names]
    parts = tuple(sorted({part for _, p, c in ROWS for part in record.parts_of(f"{p}-w2g64", c)}))
    head = record.header(parts)
    shape = {"architecture": "gpt2", "width": WIDTH, "depth": DEPTH, "heads": HEADS, "steps": STEPS, "context": CONTEXT}
    exact = score(model)
    rows = [row(model, name, bits, args.work) for name in names for bits in WIDTHS]
    order = {name: at for at, (name, _, _) in enumerate(ROWS)}
    rows = sorted([*kept, *rows], key=lambda found: (found["bits"], order.get(found["name"], len(order))))
    record.write_result(args.out, {**head, "model": shape, "float": exact, "rows": rows})


if __name__ == "__main__":
    main()

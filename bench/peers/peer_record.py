"""What the peers' scripts share: calibration tokens, the evaluation of a model, the JSON record.

Nothing here uses the project's own quantization code, or knows the software that is measured.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# How a text file becomes the one string that is tokenized.
JOINS = {
    "raw": "the file's text, unchanged",
    "rows": "blank lines emptied, every other line with its line feed, joined with two line feeds",
    "docs": "one document a line, joined with two line feeds",
}


def read_text(path: Path, join: str) -> str:
    text = path.read_text(encoding="utf-8")
    if join == "raw":
        return text
    lines = text.removesuffix("\n").split("\n")
    if join == "rows":
        lines = [line + "\n" if line.strip() else "" for line in lines]
    return "\n\n".join(lines)


def digest(ids: torch.Tensor) -> str:
    """sha256 of the token ids as little-endian 64-bit integers, row after row."""
    return hashlib.sha256(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def cpu_seconds() -> float:
    """User plus system time of this process (all threads) and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions(tool: str) -> dict[str, str]:
    packages = ("torch", "transformers", tool)
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def command_line() -> str:
    """The command as typed, with every path cut to its last part."""

    def shorten(word: str) -> str:
        if "/" not in word:
            return word
        kept, _, path = word.rpartition(":")
        return f"{kept}:{Path(path).name}" if kept else Path(path).name

    return " ".join([Path(sys.argv[0]).name, *map(shorten, sys.argv[1:])])


def origin(made_by: str, tool: str, args: argparse.Namespace) -> dict:
    """What made a record; ``tool`` is the package installed for it, whether it was used or not."""
    made = {"tool": made_by, "model": args.model.name, "note": args.note}
    return {**made, "versions": versions(tool), "command": command_line()}


def update_record(path: Path, **entries) -> None:
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record.update(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def calibration_tokens(tokenizer, path: Path, documents: int, min_chars: int, length: int) -> torch.Tensor:
    """The first ``length`` tokens of the first ``documents`` lines longer than ``min_chars`` characters."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if len(line) <= min_chars:
            continue
        ids = tokenizer(line)["input_ids"][:length]
        if len(ids) < length:
            raise SystemExit(f"a document of {len(line)} characters has only {len(ids)} tokens, {length} are needed")
        rows.append(ids)
        if len(rows) == documents:
            return torch.tensor(rows, dtype=torch.int64)
    raise SystemExit(f"{path.name}: {len(rows)} documents are longer than {min_chars} characters, {documents} needed")


def calibration_entry(args: argparse.Namespace, tokens: torch.Tensor) -> dict:
    """The record of what a quantization was calibrated on."""
    return {
        "file": args.calibration.name,
        "documents": args.documents,
        "tokens_each": args.length,
        "min_chars_exclusive": args.min_chars,
        "batch_size": args.batch_size,
        "ids_sha256": digest(tokens),
    }


def score_text(model, ids: torch.Tensor, windows: int, length: int) -> dict:
    """Mean negative log-likelihood of each window; the first token of a window has no context and is not scored."""
    count = min(windows, len(ids) // length)
    used = ids[: count * length].view(count, length)
    means = []
    for row in used:
        logits = model(row[None]).logits[0, :-1]
        picked = logits.gather(1, row[1:, None])[:, 0]
        means.append((logits.logsumexp(1) - picked).double().mean().item())
        print(f"  window {len(means)}/{count}: mean {math.exp(sum(means) / len(means)):.4f}", flush=True)
    return {
        "ppl": math.exp(sum(means) / count),
        "windows": count,
        "window_tokens": length,
        "scored_tokens_per_window": length - 1,
        "tokens_in_text": len(ids),
        "ids_sha256": digest(used),
        "window_mean_nll": means,
    }


@torch.inference_mode()
def evaluate(tool: str, args: argparse.Namespace) -> None:
    """Score ``args.text`` with the weights of ``args.weights`` in the float32 model and extend the record."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.weights:
        own = model.state_dict()
        for name, weight in load_file(args.weights).items():
            own[name].copy_(weight)
    else:
        update_record(args.out, **origin("none (unquantized)", tool, args))
    results = json.loads(args.out.read_text(encoding="utf-8")).get("evaluation", {})
    for spec in args.text:
        name, _, rest = spec.partition("=")
        join, _, path = rest.partition(":")
        if join not in JOINS or not path:
            raise SystemExit(f"--text {spec}: expected NAME=JOIN:PATH with JOIN one of {', '.join(JOINS)}")
        ids = tokenizer(read_text(Path(path), join), add_special_tokens=False)["input_ids"]
        scored = score_text(model, torch.tensor(ids), args.windows, args.window_tokens)
        results[name] = {"file": Path(path).name, "join": join, "join_rule": JOINS[join], **scored}
        update_record(args.out, evaluation=results, evaluate_dtype="float32")
        print(f"{args.out.stem}: {name} ({join}) perplexity {scored['ppl']:.4f}", flush=True)


def add_steps(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add both steps to a script's parser; returns that of ``quantize``, for the tool's own options."""
    steps = parser.add_subparsers(dest="step", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=Path, required=True, help="folder of the float32 model and its tokenizer")
    common.add_argument("--out", type=Path, required=True, help="JSON record, created or extended")
    common.add_argument("--note", default="", help="free text kept in the record")

    quantize = steps.add_parser("quantize", parents=[common], help="quantize and write the dequantized weights")
    quantize.add_argument("--calibration", type=Path, required=True, help="text file, one document a line")
    quantize.add_argument("--weights", type=Path, required=True, help="safetensors file to write")

    step = steps.add_parser("evaluate", parents=[common], help="perplexity of the float or dequantized model")
    step.add_argument("--weights", type=Path, help="safetensors file to read; none: the unquantized model")
    joins = "; ".join(f"{name}: {rule}" for name, rule in JOINS.items())
    step.add_argument("--text", action="append", required=True, metavar="NAME=JOIN:PATH", help=joins)
    step.add_argument("--windows", type=int, default=20)
    step.add_argument("--window-tokens", type=int, default=2048)
    return quantize

"""Show that newer code gives the same bytes as the code a result was measured with, so that the result still stands.

    python bench/unchanged.py OLD_COMMIT --model DIR --work DIR [--data DIR] [--layers 3] [--only GLOB]

A change for a new method touches files that old results depend on, and measuring them all again takes a day. For every
result that is stale now and was fresh at ``OLD_COMMIT``, its recipe is run by both versions of the code, as the command
line program, on the first layers of the yardstick model, a part of its text and few steps. If every tensor of the files
is the same to the byte, and a score of the two is the same to the last bit, the pair of code hashes goes into
``bench/results/unchanged.json``, and ``record.stale`` takes one for the other. Recipes that differ in nothing but what
is overridden away are run once.

What this does not show: that code which only the later layers or the rest of the text would reach is unchanged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import cost
import record
import yardstick

# Overrides that say what was done before there was a choice: code without the choice does not know them.
NEUTRAL = ("spec.rotation=0", "method.optimizer=sign", "method.choose=false")
HASH = """
import sys
from bitfloor.recipe.load import load_recipe
print(load_recipe(sys.argv[1], sys.argv[3:], calibration=sys.argv[2]).sha256())
"""
STEPS = 10  # of learning, at most
SCORE = """
import json, sys
from bitfloor import evaluate
print(json.dumps(evaluate(sys.argv[1], perplexity=[sys.argv[2]], windows=1, seqlen=512)))
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the older code")
    parser.add_argument("--model", type=Path, required=True, help="folder of the yardstick model")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and the older code")
    parser.add_argument("--data", type=Path, help=f"folder of the texts; default: ${record.DATA}")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--only", default="*", metavar="GLOB", help="results by name")
    return parser.parse_args(argv)


def cut(model: Path, layers: int, out: Path) -> Path:
    """The model's first layers, as a model."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((out / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = layers
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(model / "model.safetensors")
    beyond = tuple(f"model.layers.{k}." for k in range(layers, 1000))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(beyond)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def older_tree(commit: str, work: Path) -> Path:
    """The older code, its kernels built."""
    tree = work / f"code-{commit}"
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=record.ROOT, check=True)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=tree, check=True, capture_output=True)
    return tree


def candidates(results: Path, package: Path) -> list[dict[str, Any]]:
    """Results that are stale by their code and were not with the older package."""
    found = []
    for path in sorted((results / "yardstick").glob("*.json")):
        content = record.read_result(path)
        if "recipe" not in content or record.stale(path) is None or record.stale(path, package) is not None:
            continue
        found.append({"name": path.stem, **{key: content[key] for key in ("recipe", "code")}})
    return found


def in_words_of(tree: Path, recipe: dict[str, Any]) -> list[str]:
    """The overrides of a recipe as a version of the code knows them: with them it has the recipe's hash.

    Raises:
        SystemExit: it has another recipe under that name.
    """
    plain = [override for override in recipe["overrides"] if override not in NEUTRAL]
    environment = {**cost.source_environment(), "PYTHONPATH": str(tree / "src")}
    for overrides in (recipe["overrides"], plain):
        command = [sys.executable, "-c", HASH, recipe["preset"], recipe["calibration"], *overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.stdout.strip() == recipe["sha256"]:
            return list(overrides)
    raise SystemExit(f"{tree.name} makes something else of the recipe {recipe['preset']}")


def shortened(recipe: dict[str, Any]) -> list[str]:
    """Overrides that leave fewer steps to take, for recipes that learn."""
    from bitfloor.recipe.load import load_recipe

    resolved = load_recipe(recipe["preset"], recipe["overrides"])
    found = []
    if resolved.method.options.get("steps", 0) > STEPS:
        found.append(f"method.steps={STEPS}")
    if resolved.tune is not None:
        found.append(f"tune.steps={STEPS}")
    return found


def made_by(tree: Path, line: Sequence[Any], out: Path, text: Path) -> dict[str, Any]:
    """Hash of the tensors that one version of the code writes, and their score on the text."""
    shutil.rmtree(out, ignore_errors=True)
    environment = cost.source_environment()
    environment["PYTHONPATH"] = str(tree / "src")
    cost.measure(cost.bitfloor_command("quantize", *line, "--out", out), cwd=text.parent, env=environment)
    command = [sys.executable, "-c", SCORE, str(out), str(text)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    score = json.loads(done.stdout.splitlines()[-1])["perplexity"][0]["value"]
    return {"tensors": tensors_sha256(out), "score": score}


def tensors_sha256(folder: Path) -> str:
    """Hash of names, types, shapes and bytes of all tensors; what files say beside them may be of another version."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                first, last = entry["data_offsets"]
                file.seek(start + first)
                content = hashlib.sha256(file.read(last - first)).hexdigest()
                found[name] = [entry["dtype"], entry["shape"], content]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if some result's bytes did change."""
    args = arguments(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    text = record.data_file(args.data, yardstick.CALIBRATION)
    model = cut(args.model.resolve(), args.layers, args.work.resolve() / "model")
    tree = older_tree(args.commit, args.work.resolve())
    path = args.results / "unchanged.json"
    pairs: list[dict[str, Any]] = record.read_result(path)["pairs"] if path.exists() else []
    settings = {"commit": args.commit, "layers": args.layers, "sequences": args.sequences}
    settings["model"] = args.model.resolve().name
    seen: dict[str, tuple[Any, Any]] = {}
    changed = 0
    for result in candidates(args.results, tree / "src" / "bitfloor"):
        if not fnmatchcase(result["name"], args.only):
            continue
        code, recipe = result["code"], result["recipe"]
        now = record.code_sha256(code["parts"])
        lines = []
        for version in (tree, record.ROOT):
            line = [model, "--recipe", recipe["preset"], f"calibration.text={text.name}", *in_words_of(version, recipe)]
            lines.append([*line, f"calibration.sequences={args.sequences}", *shortened(recipe)])
        key = repr([part for part in lines[1] if not str(part).startswith("calibration.sequences")])
        if key not in seen:
            outs = [args.work.resolve() / name for name in ("by-older", "by-newer")]
            seen[key] = (made_by(tree, lines[0], outs[0], text), made_by(record.ROOT, lines[1], outs[1], text))
        older, newer = seen[key]
        same = older == newer
        changed += not same
        yardstick.say(f"{result['name']}: {'same bytes, same score' if same else f'DIFFERENT {older} {newer}'}")
        if same:
            ran = record.code_sha256(code["parts"], tree / "src" / "bitfloor")
            pair = {"result": result["name"], "parts": code["parts"], "was": ran, "is": now, **settings, **newer}
            pairs = [
                *(other for other in pairs if (other["result"], other["was"]) != (pair["result"], pair["was"])),
                pair,
            ]
            content = {**record.header(()), "pairs": pairs}
            del content["code"]
            record.write_result(path, content)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Same command, same bytes: twice from the start, and after being killed at many moments.

    python bench/determinism.py --work DIR [--model DIR --text FILE] [--kills 50]

Two parts, both on a small model (by default a Llama of 12 layers and 64 channels, made on the spot):

*Runs.* The command line program quantizes twice with one thread and twice with all; every file of the two output
folders must have the same SHA-256.

*Kills.* A run is started and killed with SIGKILL, the same call is repeated on what is left, killed again, and so on
until an attempt is left alone long enough to finish: then every file must equal the uninterrupted run's. Then the next
sequence starts, until the asked number of kills has landed. Where they land is chosen in three ways, by a seeded
generator: at a random moment; at the sight of a temporary file (inside a write) after a random moment; or while the
finished blocks are merged into the checkpoint. Nothing in the program helps with that: the folder is watched from
outside, and what a kill hit is read from what it left behind. Also checked after every kill: a folder that has a
``config.json`` (and so passes for a model) holds the complete one.

Starting Python and importing torch takes seconds, of which a kill inside would prove nothing. So attempts are forks of
one process that has imported everything and does nothing else: a child is in the state of a program whose imports have
just ended. That is safe because this process has a single thread (it sets the thread counts to one before the imports,
and checks), and the bytes are compared with those of the command line program started normally. A kill counts only if
the output folder existed. SIGKILL loses no page that was written; power cuts are not tried here.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attempts
import cost
import record
import synthetic

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# How often each way of choosing the moment of a kill is taken.
ODDS = {"moment": 5, "write": 3, "merge": 2}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and runs")
    parser.add_argument("--model", type=Path, help="folder of a model; default: one made on the spot")
    parser.add_argument("--text", type=Path, help="calibration text, one document a line; default: made on the spot")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "determinism.json")
    parser.add_argument("--recipe", default="gptq-w3g64")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--layers", type=int, default=12, help="of the model made on the spot")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-runs", action="store_true", help="only the kills")
    return parser.parse_args(argv)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a finished folder, the journal and temporary files left out."""
    return {
        path.relative_to(folder).as_posix(): record.file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and attempts.JOURNAL not in path.parts and path.suffix != ".tmp"
    }


def run_command(trial: attempts.Trial, out: str, threads: int) -> dict[str, str]:
    """Quantize with the command line program, started normally."""
    line = ["quantize", trial.model, "--out", out, "--recipe", trial.recipe, "--calib", trial.text, *trial.overrides]
    cost.measure(
        cost.bitfloor_command(*line),
        cwd=trial.work,
        env=cost.source_environment(**dict.fromkeys(THREADS, str(threads))),
    )
    return hashes(trial.work / out)


# -- the two parts ----------------------------------------------------------------------------------------------------


def kill_trials(trial: attempts.Trial, kills: int, seed: int) -> dict[str, Any]:
    """Kill and resume until ``kills`` kills have landed; the last sequence is finished too."""
    attempts.check_single_thread()
    rng = random.Random(seed)
    duration, merge = attempts.finish(trial, "uninterrupted")
    reference = hashes(trial.work / "uninterrupted")
    landed: list[dict[str, Any]] = []
    missed = sequences = different = premature = 0
    while len(landed) < kills:
        out = f"sequence-{sequences}"
        done = False
        while not done and len(landed) < kills:
            mode = rng.choices(tuple(ODDS), tuple(ODDS.values()))[0]
            done = attempts.attempt(trial, out, mode, rng.uniform(0, duration), rng.uniform(0, merge))
            if done:
                break
            hit = attempts.classify(trial.work / out, trial.parts)
            if hit is None:
                missed += 1
                continue
            if (trial.work / out / "config.json").exists() and hashes(trial.work / out) != reference:
                premature += 1
            landed.append({"sequence": sequences, "chosen_by": mode, **hit})
        if not done:
            attempts.finish(trial, out)
        left = (trial.work / out / attempts.JOURNAL).exists() or any(attempts.temporaries(trial.work / out))
        same = hashes(trial.work / out) == reference and not left
        different += not same
        if same:
            shutil.rmtree(trial.work / out)
        sequences += 1
        say(f"{len(landed)} of {kills} kills, sequence {sequences}: {'same bytes' if same else 'DIFFERENT'}")
    return {
        "files": reference,
        "uninterrupted_seconds": round(duration, 2),
        "parts": trial.parts,
        "kills": len(landed),
        "kills_before_the_folder_existed": missed,
        "sequences": sequences,
        "sequences_with_other_bytes": different,
        "folders_with_config_but_incomplete": premature,
        "landed": {
            "by_stage": dict(collections.Counter(kill["stage"] for kill in landed)),
            "inside_a_write": sum(bool(kill["inside_write_of"]) for kill in landed),
            "by_written_file": dict(collections.Counter(n for kill in landed for n in kill["inside_write_of"])),
            "by_parts_finished": dict(sorted(collections.Counter(kill["parts_finished"] for kill in landed).items())),
        },
        "each": landed,
    }


def run_trials(trial: attempts.Trial) -> dict[str, Any]:
    """Two runs with one thread, two with all; whether each pair is equal, and the hashes of the first."""
    found: dict[str, Any] = {}
    counts = sorted({1, len(os.sched_getaffinity(0))})
    for threads in counts:
        pair = [run_command(trial, f"run-{threads}-{index}", threads) for index in range(2)]
        found[str(threads)] = {"same": pair[0] == pair[1], "files": pair[0]}
        say(f"two runs with {threads} thread(s): {'same bytes' if pair[0] == pair[1] else 'DIFFERENT'}")
    return found


def prepare(args: argparse.Namespace) -> attempts.Trial:
    """Make or link the model and the text below the work folder, and look at the model once."""
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for old in [*work.glob("sequence-*"), *work.glob("run-*"), work / "uninterrupted", work / "model"]:
        if old.is_symlink():
            old.unlink()
        elif old.exists():
            shutil.rmtree(old)
    if args.model:
        (work / "model").symlink_to(args.model.resolve(), target_is_directory=True)
    else:
        synthetic.build(work / "model", synthetic.Shape(args.layers, 64, 128, head_dim=16, dtype="float32"))
    if args.text:
        shutil.copyfile(args.text, work / synthetic.CALIBRATION)
    else:
        synthetic.write_text(work, args.sequences, 8 * args.seqlen)
    overrides = (
        f"calibration.sequences={args.sequences}",
        f"calibration.seqlen={args.seqlen}",
        "calibration.mode=documents",
        "calibration.min_chars=0",
    )
    from bitfloor.modeling.loader import open_source

    blocks = open_source(work / "model").map.n_blocks
    return attempts.Trial(work, "model", synthetic.CALIBRATION, args.recipe, overrides, parts=blocks + 1)


def say(text: str) -> None:
    """Progress goes to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> None:
    """Run both parts, write; the exit status is 1 when any bytes differ."""
    args = arguments()
    os.environ.update(dict.fromkeys(THREADS, "1"), TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    attempts.single_thread()
    trial = prepare(args)
    head = record.header((*record.parts_of(trial.recipe), *record.RUNNING))
    recipe = {
        "preset": trial.recipe,
        "overrides": list(trial.overrides),
        "calibration": trial.text,
        "sha256": record.recipe_sha256(trial.recipe, trial.overrides, trial.text),
    }
    runs = {} if args.skip_runs else run_trials(trial)
    kills = kill_trials(trial, args.kills, args.seed)
    name = args.model.resolve().name if args.model else f"synthetic Llama, {args.layers} layers, 64 channels"
    same_as_command = runs["1"]["files"] == kills["files"] if runs else None
    good = (
        all(pair["same"] for pair in runs.values())
        and same_as_command is not False
        and not kills["sequences_with_other_bytes"]
        and not kills["folders_with_config_but_incomplete"]
    )
    content = {"model": name, "recipe": recipe, "seed": args.seed, "runs": runs, "kill_trials": kills}
    record.write_result(args.out, {**head, **content, "forked_run_equals_command_line": same_as_command, "holds": good})
    say(f"kills landed: {kills['landed']['by_stage']}, {kills['landed']['inside_a_write']} of them inside a write")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

"""Blend three seeds on real matbench crystals: is their mean better than each seed, and do fitted weights help?

    python -m benchmarks.blends --data FOLDER

FOLDER contains matbench_mp_e_form_joined_31073.jsonl.gz (crystals with their matbench ids and targets). The benchmark
takes 1,500 of these crystals (every n-th line) and trains `head_finetune` with three seeds on five folds, in a
temporary project. In the first round, each seed has its own validation set. In the second round, all seeds share a
validation set: 15 % of the training set, enough to fit weights. The benchmark prints the test MAE of every member and
blend on every fold. The MAEs are not leaderboard scores, because the crystals are not the whole dataset.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.science import FILE, mbqueue

SEEDS = "0-2"
SHARED = ["--set", "train.validation_seed=0", "--set", "train.validation=0.15"]


def write_crystals(source: Path, target: Path, number: int) -> None:
    """Write up to ``number`` evenly spaced lines of a file of crystals."""
    with gzip.open(source, "rt", encoding="utf-8") as stream:
        lines = stream.readlines()
    chosen = lines[:: max(1, len(lines) // number)][:number]
    target.write_text("".join(chosen), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the joined crystals")
    parser.add_argument("--crystals", type=int, default=1500)
    parser.add_argument("--epochs", type=int, help="epochs, instead of those in the experiment file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mbqueue-blends-") as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "mbqueue", "init", str(root)], check=True, stdout=subprocess.DEVNULL)
        write_crystals(arguments.data / FILE, root / "crystals.jsonl", arguments.crystals)
        epochs = [] if arguments.epochs is None else ["--epochs", str(arguments.epochs)]
        for name, settings in (("own", []), ("shared", SHARED)):
            given = ["--dataset", "crystals.jsonl", "--seeds", SEEDS, "--name", name, *epochs, *settings]
            mbqueue(root, "enqueue", "head_finetune", *given)
        mbqueue(root, "work", "--session", "none")
        for name, weights in (("own", "mean"), ("shared", "mean"), ("shared", "fitted")):
            members = [f"{name}.seed{seed}" for seed in range(3)]
            mbqueue(root, "blend", *members, "--weights", weights, "--name", f"{name}.{weights}")
        mbqueue(root, "work", "--session", "none")
        overview = json.loads(mbqueue(root, "status", "--json"))
        folds = {e["name"]: {f["fold"]: f["test_mae"] for f in e["folds"]} for e in overview["experiments"]}
    print(f"\ntest MAE in eV/atom, {arguments.crystals} crystals")
    print(f"{'experiment':<16}" + "".join(f"{f'fold {fold}':>9}" for fold in range(5)) + f"{'mean':>9}")
    for name, maes in folds.items():
        cells = "".join(f"{maes[fold]:>9.4f}" for fold in range(5))
        print(f"{name:<16}{cells}{sum(maes.values()) / len(maes):>9.4f}")
    for name in ("own", "shared"):
        alone = [sum(folds[f"{name}.seed{seed}"][fold] for seed in range(3)) / 3 for fold in range(5)]
        better = sum(folds[f"{name}.mean"][fold] < alone[fold] for fold in range(5))
        print(f"{name}.mean has a lower MAE than its members' average on {better} of 5 folds")


if __name__ == "__main__":
    main()

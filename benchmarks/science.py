"""Check the science: run the three shipped experiments on real matbench crystals, few enough for a CPU.

    python -m benchmarks.science --data FOLDER

FOLDER contains matbench_mp_e_form_joined_31073.jsonl.gz (crystals with their matbench ids and targets). The benchmark
draws 2,000 of these crystals. In a temporary project, the benchmark runs `pretrained_infer` and `head_finetune` on five
folds, and `full_finetune` on two folds for 5 epochs. The benchmark prints every fold's test MAE. The MAEs are not
leaderboard scores, because the crystals are not the whole dataset.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILE = "matbench_mp_e_form_joined_31073.jsonl.gz"
EXPERIMENTS = {
    "pretrained_infer": [],
    "head_finetune": [],
    "full_finetune": ["--folds", "0,1", "--epochs", "5"],
}


def mbqueue(root: Path, *arguments: str) -> str:
    """Run an mbqueue command in the project, and return its standard output."""
    command = [sys.executable, "-m", "mbqueue", "--project", str(root), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the joined crystals")
    parser.add_argument("--crystals", type=int, default=2000)
    arguments = parser.parse_args()
    dataset = (arguments.data / FILE).absolute()
    with tempfile.TemporaryDirectory(prefix="mbqueue-science-") as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "mbqueue", "init", str(root)], check=True, stdout=subprocess.DEVNULL)
        rows = []
        for name, options in EXPERIMENTS.items():
            mbqueue(
                root, "enqueue", name, "--dataset", str(dataset), "--set", f"data.limit={arguments.crystals}", *options
            )
            began = time.perf_counter()
            mbqueue(root, "work", "--session", "none")
            rows.append((name, time.perf_counter() - began))
        overview = json.loads(mbqueue(root, "status", "--json"))
    folds = {e["name"]: {f["fold"]: f["test_mae"] for f in e["folds"]} for e in overview["experiments"]}
    print(f"\ntest MAE in eV/atom, {arguments.crystals} crystals")
    print(f"{'experiment':<18}" + "".join(f"{f'fold {fold}':>9}" for fold in range(5)) + f"{'wall':>9}")
    for name, seconds in rows:
        scores = "".join(f"{folds[name][fold]:>9.4f}" if fold in folds[name] else f"{'':>9}" for fold in range(5))
        print(f"{name:<18}{scores}{seconds:>8.0f}s")


if __name__ == "__main__":
    main()

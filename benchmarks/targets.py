"""Train scalars and a class on real crystals: does finetuning beat the composition alone, and does that beat the mean?

    python -m benchmarks.targets --data FOLDER

FOLDER contains matminer_elastic.jsonl.gz (log10_K_VRH, log10_G_VRH) and matminer_dielectric.jsonl.gz (refractive_index,
band_gap_eV). In a temporary project, one session runs five folds of three experiments: `pretrained_infer` (the
composition alone), `scalar_head` or `class_head`, and `full_finetune` for one epoch with the settings in FULL. All
these crystals have a band gap, so the class is whether the band gap is above 1.5 eV. The benchmark prints the mean and
standard deviation of each experiment over the folds. For comparison, the benchmark prints the score of predicting the
training part's mean. The scores are not leaderboard scores.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mbqueue.data.folds import test_rows, train_rows
from mbqueue.results.folder import read_recorded

TARGETS = {
    "K": ("elastic", {"name": "log K_VRH", "unit": "log10(GPa)", "kind": "scalar", "column": "log10_K_VRH"}),
    "G": ("elastic", {"name": "log G_VRH", "unit": "log10(GPa)", "kind": "scalar", "column": "log10_G_VRH"}),
    "n": ("dielectric", {"name": "refractive index", "kind": "scalar", "column": "refractive_index"}),
    "gap": ("dielectric", {"name": "band gap", "unit": "eV", "kind": "scalar", "column": "band_gap_eV"}),
    "wide": ("wide", {"name": "band gap above 1.5 eV", "kind": "class", "column": "is_wide"}),
}
#: The head starts untrained and needs a high learning rate. Blocks further from the head get lower learning rates, so
#: that they change less.
FULL = {
    "epochs": 1,
    "batch_size": 16,
    "lr": 1e-2,
    "layer_lr_decay": 0.3,
    "huber_delta": 0.1,
    "weight_decay": 0.1,
    "ema_decay": 0.98,
    "validation": 0.1,
}


def mbqueue(root: Path, *arguments: str) -> str:
    """Run an mbqueue command in the project, and return its standard output."""
    command = [sys.executable, "-m", "mbqueue", "--project", str(root), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def wide_gaps(source: Path, path: Path) -> None:
    """Write the crystals with a class: whether the band gap is above 1.5 eV."""
    with gzip.open(source, "rt") as rows, gzip.open(path, "wt") as out:
        for line in rows:
            row = json.loads(line)
            out.write(json.dumps({**row, "is_wide": row["band_gap_eV"] > 1.5}) + "\n")


def dummy(path: Path, column: str) -> float:
    """Calculate the MAE of always predicting the mean of the training set, averaged over the folds."""
    with gzip.open(path, "rt") as rows:
        targets = np.array([json.loads(line)[column] for line in rows], np.float64)
    n = len(targets)
    errors = [np.abs(targets[test_rows(n, f)] - targets[train_rows(n, f)].mean()).mean() for f in range(5)]
    return float(np.mean(errors))


def settings(target: dict[str, str], dataset: Path, train: dict[str, Any]) -> list[str]:
    """Return the options of `enqueue` for this target, dataset and training."""
    keys = {"data.dataset": str(dataset), **{f"target.{key}": value for key, value in target.items()}}
    given = {**{key: json.dumps(value) for key, value in keys.items()}, **{f"train.{k}": v for k, v in train.items()}}
    return [part for key, value in given.items() for part in ("--set", f"{key}={value}")]


def _head_of(target: dict[str, str]) -> str:
    return "class_head" if target["kind"] == "class" else "scalar_head"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two files")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="mbqueue-targets-") as folder:
        root = Path(folder)
        subprocess.run([sys.executable, "-m", "mbqueue", "init", str(root)], check=True, stdout=subprocess.DEVNULL)
        files = {name: arguments.data.absolute() / f"matminer_{name}.jsonl.gz" for name in ("elastic", "dielectric")}
        files["wide"] = root / "wide.jsonl.gz"
        wide_gaps(files["dielectric"], files["wide"])
        runs = {key: ("pretrained_infer", _head_of(TARGETS[key][1]), "full_finetune") for key in arguments.targets}
        for key, experiments in runs.items():
            source, target = TARGETS[key]
            for experiment in experiments:
                train = FULL if experiment == "full_finetune" else {}
                options = settings(target, files[source], train)
                mbqueue(root, "enqueue", experiment, "--name", f"{key}-{experiment}", *options)
        mbqueue(root, "work", "--session", "none")
        for key, experiments in runs.items():
            source, target = TARGETS[key]
            for experiment in experiments:
                [done] = root.glob(f"results/daily/*/{key}-{experiment}")
                recorded = read_recorded(done)
                found = recorded.spread(recorded.measure)
                assert found is not None, "every fold has both classes"
                print(f"{done.name:<24} {recorded.measure.label} {found['mean']:.4f} ± {found['std']:.4f}", flush=True)
            if target["kind"] != "class":
                print(f"{key}-dummy MAE {dummy(files[source], target['column']):.4f}", flush=True)


if __name__ == "__main__":
    main()

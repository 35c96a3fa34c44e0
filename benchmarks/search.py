"""Search on real crystals with and without pruning: how many epochs does pruning save, and does it find the best trial?

    python -m benchmarks.search --data FILE

FILE is a table of crystals with formation energies. In a temporary project, the benchmark runs the search file of
`--search` twice with the same trials, first without pruning, then with the file's pruner. The first table shows the
number of epochs that each run trained, and its best validation MAE. Then the benchmark trains the base and the three
best settings on `--seeds` and `--folds` that the search did not use. The next table shows the test MAEs, and how they
differ from the base's. `--larger` repeats the comparison with the base on more crystals. The MAEs are not leaderboard
scores.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbqueue.dashboard.searches import settings_text
from mbqueue.search.file import Search
from mbqueue.search.study import is_unpromising
from mbqueue.search.trials import Trial, TrialState, best_of, trials_of

RECIPE = Path(__file__).with_name("recipe_head.toml")
CONFIRMED = 3
BASE = "base"

Recipes = dict[str, Mapping[str, Any]]


def mbqueue(root: Path, *arguments: str) -> str:
    """Run an mbqueue command in the project, and return its standard output."""
    command = [sys.executable, "-m", "mbqueue", "--project", str(root), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def overview(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mbqueue(root, "status", "--json"))
    return found


def small_crystals(source: Path, atoms: int, path: Path) -> Path:
    """Write a table of the crystals with at most this many atoms, and return its path."""
    with gzip.open(source, "rt") as rows, gzip.open(path, "wt", compresslevel=1) as out:
        out.writelines(line for line in rows if len(json.loads(line)["structure"]["sites"]) <= atoms)
    return path


def prepare(root: Path, search: Path, values: dict[str, Any]) -> str:
    """Make a project, set keys in the base's file to ``values``, and return the base's name."""
    mbqueue(root, "init", str(root))
    base: str = tomllib.loads(search.read_text(encoding="utf-8"))["search"]["base"]
    path = root / "jobs" / f"{base}.toml"
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        text = re.sub(rf"(?m)^{key} = \S+", f"{key} = {json.dumps(value)}", text)
    path.write_text(text, encoding="utf-8")
    return base


def run_search(root: Path, search: Path, *, pruner: str | None) -> dict[str, Any]:
    """Run a search to its end; return its row in the JSON of `status`, with the wall time and all trials added."""
    text = search.read_text(encoding="utf-8")
    pruner = pruner or tomllib.loads(text)["search"]["pruner"]
    name = f"search-{pruner}"
    (root / "jobs" / f"{name}.toml").write_text(
        re.sub(r'(?m)^pruner = "\w+"', f'pruner = "{pruner}"', text), encoding="utf-8"
    )
    mbqueue(root, "enqueue", name)
    began = time.perf_counter()
    mbqueue(root, "work", "--session", "none")
    seen = overview(root)
    [row] = [row for row in seen["searches"] if row["name"] == name]
    return row | {"wall": time.perf_counter() - began, "all": trials_of(seen, name)}


def as_searched(search: Path) -> Search:
    """Read a search from its file, without the spec of its base experiment."""
    return Search.model_validate({"name": search.stem, **tomllib.loads(search.read_text(encoding="utf-8"))["search"]})


def replayed(search: Search, trials: Sequence[Trial]) -> tuple[int, float]:
    """Replay a search with its pruner on trials in this order; return the number of epochs and the best value.

    Args:
        trials: fully trained trials of one fold.
    """
    epochs, so_far = 0, list[Trial]()
    for whole in trials:
        [(fold, curve)] = whole.curves.items()
        for epoch in range(1, len(curve) + 1):
            epochs += 1
            trial = (
                whole
                if epoch == len(curve)
                else dataclasses.replace(whole, curves={fold: curve[:epoch]}, state=TrialState.OPEN, is_trained=False)
            )
            if trial is not whole and is_unpromising(search, [*so_far, trial], trial.number, fold):
                trial = dataclasses.replace(trial, state=TrialState.PRUNED)
                break
        so_far.append(trial)
    best = best_of(so_far)
    assert best is not None
    assert best.value is not None
    return epochs, best.value


def compare(whole: dict[str, Any], pruned: dict[str, Any], search: Search, orders: int) -> None:
    """Print which share of the epochs the pruned search trained, and how pruning changed the best MAE.

    Repeat the comparison for ``orders`` random orders of the trials.
    """
    trials: list[Trial] = whole["all"]
    assert [trial.settings for trial in trials] == [trial.settings for trial in pruned["all"]]
    found = pruned["epochs_done"], pruned["best"]["val_mae"]
    assert found == replayed(search, trials), "the sessions must prune as the replay does"
    found = [found, *(replayed(search, random.Random(n).sample(trials, len(trials))) for n in range(orders))]
    shares = [epochs / whole["epochs_done"] for epochs, _ in found]
    apart = [best / whole["best"]["val_mae"] - 1 for _, best in found]
    print(f"pruned: {shares[0]:.1%} of the epochs, best validation MAE {apart[0]:+.2%}")
    if orders:
        print(
            f"these trials in {orders} random orders: {min(shares[1:]):.1%} to {max(shares[1:]):.1%} of the epochs, "
            f"best validation MAE {statistics.mean(apart[1:]):+.2%} on average, at most {max(apart[1:]):+.2%}"
        )


def confirm(root: Path, base: str, recipes: Recipes, *, limit: int, seeds: list[int], folds: list[int]) -> None:
    """Train each recipe on `limit` crystals with each seed, and print its scores and differences from the base."""
    names = {(name, seed): f"{name}-{limit}-seed{seed}" for name in recipes for seed in seeds}
    for (name, seed), experiment in names.items():
        settings = {**recipes[name], "seed": seed, "data.limit": limit}
        given = [f"--set={key}={value}" for key, value in settings.items()]
        mbqueue(root, "enqueue", base, "--name", experiment, "--folds", ",".join(map(str, folds)), *given)
    mbqueue(root, "work", "--session", "none")
    folds_of = {entry["name"]: entry["folds"] for entry in overview(root)["experiments"]}
    scores = {
        (name, seed, fold["fold"]): fold["test_mae"]
        for (name, seed), experiment in names.items()
        for fold in folds_of[experiment]
    }
    pairs = [(seed, fold) for seed in seeds for fold in folds]
    print(f"\n{limit or 'all'} crystals: test MAE in eV/atom; mean difference from the base, with its standard error")
    print(f"{'recipe':<8}" + "".join(f"{f'seed {seed} fold {fold}':>15}" for seed, fold in pairs))
    for name in recipes:
        row = f"{name:<8}" + "".join(f"{scores[name, *pair]:>15.5f}" for pair in pairs)
        apart = [scores[name, *pair] - scores[BASE, *pair] for pair in pairs]
        if name != BASE:
            row += f"{statistics.mean(apart):>+12.5f}"
            row += f" ± {statistics.stdev(apart) / len(apart) ** 0.5:.5f}" if len(apart) > 1 else ""
        print(row, flush=True)


def show(row: dict[str, Any], name: str) -> None:
    best = row["best"]
    print(
        f"{name:<10} {len(row['all']):>4} trials {row['epochs_done']:>5} epochs {row['wall']:>6.0f} s   "
        f"best: trial {best['trial']}, {best['val_mae']:.5f} eV/atom",
        flush=True,
    )


def main() -> None:
    """Run the searches and comparisons, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="table of crystals")
    parser.add_argument("--search", type=Path, default=RECIPE, help="search file, whose base is a shipped experiment")
    parser.add_argument("--atoms", type=int, default=0, help="take crystals of at most this many atoms; 0 takes all")
    parser.add_argument("--limit", type=int, default=6000, help="number of crystals, drawn at random")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--validation", type=float, default=0.05, help="share of the training set to hold out for validation"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="seeds of the comparison with the base")
    parser.add_argument("--folds", type=int, nargs="*", default=[0, 1], help="folds of the comparison with the base")
    parser.add_argument(
        "--larger", type=int, default=0, help="number of crystals for a second comparison, whose epochs have more steps"
    )
    parser.add_argument(
        "--orders", type=int, default=20, help="number of random orders of the trials in which to repeat the pruning"
    )
    parser.add_argument("--only-pruned", action="store_true", help="skip the run without pruning")
    parser.add_argument("--project", type=Path, help="keep the project in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mbqueue-search-") as folder:
        root = (arguments.project or Path(folder)).absolute()
        values = {key: getattr(arguments, key) for key in ("limit", "epochs", "validation")}
        data = arguments.data.absolute()
        if arguments.atoms:
            data = small_crystals(data, arguments.atoms, Path(folder) / data.name)
        base = prepare(root, arguments.search, {"dataset": str(data), **values})
        rows = {}
        for pruner in ("none", None)[arguments.only_pruned :]:
            rows[pruner] = run_search(root, arguments.search, pruner=pruner)
            show(rows[pruner], pruner or "pruned")
        whole, pruned = rows.get("none", rows[None]), rows[None]
        if whole is not pruned:
            compare(whole, pruned, as_searched(arguments.search), arguments.orders)
        best = sorted(
            (trial for trial in whole["all"] if trial.is_trained), key=lambda trial: (trial.value, trial.number)
        )
        for trial in best:
            print(f"{trial.number:>3}  {trial.value:.5f}  {settings_text(trial.settings)}")
        recipes = {BASE: {}} | {f"best-{rank}": trial.settings for rank, trial in enumerate(best[:CONFIRMED], start=1)}
        confirm(root, base, recipes, limit=arguments.limit, seeds=arguments.seeds, folds=arguments.folds)
        if arguments.larger:
            confirm(root, base, recipes, limit=arguments.larger, seeds=arguments.seeds, folds=arguments.folds)


if __name__ == "__main__":
    main()

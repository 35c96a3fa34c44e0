"""Make up classes that give matbench's official folds, since the tests do not have the real classes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.folds import test_rows
from mbqueue.task import N_FOLDS, TASKS, Task

#: The fraction of metals in the task matbench_mp_is_metal (``frac_true`` in matbench's metadata).
SHARE_OF_METALS = 0.43492314796490533

#: For tests to which every official task is the same.
SMALLEST_TASK = min(TASKS.values(), key=lambda task: task.n)


def matbench_splits() -> dict[str, Any]:
    """Task → fold → the ids of its parts, from matbench."""
    spec = importlib.util.find_spec("matbench")
    assert spec is not None, "matbench has to be installed: pip install --no-deps matbench"
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "matbench_v0.1_validation.json"
    splits: dict[str, Any] = json.loads(file.read_text())["splits"]
    return splits


def official_folds(task: Task, splits: dict[str, Any]) -> list[int]:
    """For each crystal, the fold with this crystal in its test set."""
    fold_of = np.empty(task.n, np.int64)
    for fold in range(N_FOLDS):
        for name in splits[task.dataset][f"fold_{fold}"]["test"]:
            fold_of[int(name.rsplit("-", 1)[1]) - 1] = fold
    found: list[int] = fold_of.tolist()
    return found


def dealt(count: int, n: int, after: int = 0) -> list[int]:
    """The folds of a class's ``count`` crystals, in order, if the preceding class has ``after`` crystals."""
    first = after or count
    classes = np.concatenate([np.zeros(first), np.ones(n - first)])
    fold_of = np.empty(n, np.int64)
    for fold in range(N_FOLDS):
        fold_of[test_rows(n, fold, classes=classes)] = fold
    found: list[int] = fold_of[after : after + count].tolist()
    return found


def mixture(whole: list[int], a: list[int], b: list[int]) -> NDArray[np.bool_] | None:
    """Split ``whole`` into the lists ``a`` and ``b``, each in its order; return a mask of the items from ``b``.

    Return None if no such split exists. If several splits exist, take items from ``b`` as late as possible.
    """
    taken = [{0}]  # taken[n]: the possible counts of items from `a` among the first n items of `whole`
    for place, fold in enumerate(whole):
        following = {i + 1 for i in taken[-1] if i < len(a) and a[i] == fold}
        following |= {i for i in taken[-1] if 0 <= place - i < len(b) and b[place - i] == fold}
        if not following:
            return None
        taken.append(following)
    if len(a) not in taken[-1]:
        return None
    from_b, i = np.zeros(len(whole), bool), len(a)
    for place in reversed(range(len(whole))):
        if i in taken[place] and 0 <= place - i < len(b) and b[place - i] == whole[place]:
            from_b[place] = True
        else:
            i -= 1
    return from_b


def made_classes(task: Task) -> NDArray[np.bool_]:
    """Make up a class for each crystal, so that mbqueue's rule for classes gives matbench's real folds."""
    official = official_folds(task, matbench_splits())
    ones = round(SHARE_OF_METALS * task.n)
    for first in (ones, task.n - ones):
        found = mixture(official, dealt(first, task.n), dealt(task.n - first, task.n, after=first))
        if found is not None:
            return found if first != ones else ~found
    raise AssertionError("matbench's folds are not those of its rule")

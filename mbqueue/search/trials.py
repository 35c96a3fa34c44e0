"""The trials of a search, from the queue's overview."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mbqueue.queue.store import Queue

#: After this many failed trials in a row, the search waits for you to step in.
MOST_FAILED_IN_A_ROW = 3
#: The suffix that follows the search's name in a trial's name.
_NUMBER = ".{:03d}"


class TrialState(StrEnum):
    OPEN = "open"
    DONE = "done"
    PRUNED = "pruned"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a search.

    Attributes:
        experiment: the trial's name in the queue.
        settings: the value of each dotted key that the search varies.
        curves: for each fold, the validation MAE of each committed epoch.
        epochs: epochs per fold, as enqueued.
        is_trained: whether every fold has finished training.
        seconds: time spent on the trial.
        epoch_seconds: time spent on the trial's committed epochs.
    """

    number: int
    experiment: str
    settings: Mapping[str, Any]
    state: TrialState
    curves: Mapping[int, Sequence[float]]
    epochs: int
    is_trained: bool
    is_paused: bool
    priority: int
    seconds: float
    epoch_seconds: float

    @property
    def value(self) -> float | None:
        """The trial's result: the best validation MAE so far, averaged over folds; None before the first epoch."""
        best = [min(curve) for curve in self.curves.values() if curve]
        return sum(best) / len(best) if best else None

    @property
    def mean_curve(self) -> list[float]:
        """The mean validation MAE of each epoch, over the folds that have reached the epoch."""
        longest = max((len(curve) for curve in self.curves.values()), default=0)
        reached = [[curve[epoch] for curve in self.curves.values() if epoch < len(curve)] for epoch in range(longest)]
        return [sum(values) / len(values) for values in reached]

    @property
    def epochs_done(self) -> int:
        """The number of committed epochs over all folds."""
        return sum(len(curve) for curve in self.curves.values())


def trial_name(search: str, number: int) -> str:
    return search + _NUMBER.format(number)


def trials_of(overview: Mapping[str, Any], search: str) -> list[Trial]:
    """The trials of a search, by number, from `Queue.overview`."""
    found = [
        _trial(entry) for entry in overview["experiments"] if entry["trial"] and entry["trial"]["search"] == search
    ]
    return sorted(found, key=lambda trial: trial.number)


def experiments_of(queue: Queue, name: str) -> list[str]:
    """List the names of a search's trials, oldest first. If ``name`` is not a search, return only ``name``."""
    found = [trial.name for trial in queue.trials() if trial.spec["trial"]["search"]["name"] == name]
    return found or [name]


def search_names(overview: Mapping[str, Any]) -> list[str]:
    """The names of the searches in a queue's overview, oldest first."""
    return list(dict.fromkeys(entry["trial"]["search"] for entry in overview["experiments"] if entry["trial"]))


def needs_a_person(trials: Sequence[Trial]) -> bool:
    """Whether the search is waiting for you because too many trials in a row have failed."""
    last = trials[-MOST_FAILED_IN_A_ROW:]
    return len(last) == MOST_FAILED_IN_A_ROW and all(trial.state is TrialState.FAILED for trial in last)


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The fully trained trial with the lowest value; None if no trial is fully trained."""
    ended = [trial for trial in trials if trial.is_trained and trial.value is not None]
    return min(ended, key=lambda trial: (trial.value, trial.number), default=None)


def _trial(entry: Mapping[str, Any]) -> Trial:
    folds, counts = entry["folds"], entry["jobs"]
    if entry["record"] == "committed":
        state = TrialState.DONE
    elif entry["record"] == "skipped":
        state = TrialState.PRUNED
    elif counts["leased"] or counts["ready"]:
        state = TrialState.OPEN
    elif counts["failed"]:
        state = TrialState.FAILED
    else:
        state = TrialState.CANCELLED if counts["cancelled"] else TrialState.OPEN
    trained = all(fold["epochs_done"] + fold["epochs_skipped"] == fold["epochs_total"] for fold in folds)
    return Trial(
        number=entry["trial"]["number"],
        experiment=entry["name"],
        settings=entry["trial"]["settings"],
        state=state,
        curves={fold["fold"]: fold["val_mae"] for fold in folds},
        epochs=max((fold["epochs_total"] for fold in folds), default=0),
        is_trained=trained and state is not TrialState.PRUNED,
        is_paused=entry["paused"],
        priority=entry["priority"],
        seconds=entry["seconds"],
        epoch_seconds=sum(fold["epoch_seconds"] for fold in folds),
    )

"""Searches in few words: what `status` shows of one, from the trials in the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mbqueue.search.trials import Trial, TrialState, best_of, search_names, trials_of


def summaries(overview: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each search of an overview as a plain dictionary: ``searches[]`` of docs/reference/status-json.md."""
    wanted = {entry["trial"]["search"]: entry["trial"]["of"] for entry in overview["experiments"] if entry["trial"]}
    return [_summary(name, trials_of(overview, name), wanted[name]) for name in search_names(overview)]


def _summary(name: str, trials: Sequence[Trial], wanted: int) -> dict[str, Any]:
    best = best_of(trials)
    states = Counter(trial.state.value for trial in trials)
    epochs_done = sum(trial.epochs_done for trial in trials)
    saved = sum(
        trial.epochs * len(trial.curves) - trial.epochs_done for trial in trials if trial.state is TrialState.PRUNED
    )
    seconds = sum(trial.seconds for trial in trials)
    per_epoch = seconds / epochs_done if epochs_done else 0.0
    return {
        "name": name,
        "state": _state(trials, wanted),
        "trials": {state.value: states[state.value] for state in TrialState},
        "trials_wanted": wanted,
        "best": best
        and {
            "trial": best.number,
            "experiment": best.experiment,
            "val_mae": best.value,
            "settings": dict(best.settings),
        },
        "epochs_done": epochs_done,
        "epochs_saved": saved,
        "seconds": seconds,
        "seconds_saved": saved * per_epoch,
        "seconds_left": _left(trials, wanted, per_epoch),
    }


def _state(trials: Sequence[Trial], wanted: int) -> str:
    if any(trial.state is TrialState.OPEN and not trial.is_paused for trial in trials):
        return "running"
    if trials[-1].is_paused:
        return "paused"
    if trials[-1].state is TrialState.CANCELLED:
        return "cancelled"
    if wanted and len(trials) < wanted:
        return "failed" if trials[-1].state is TrialState.FAILED else "waiting"
    return "done"


def _left(trials: Sequence[Trial], wanted: int, per_epoch: float) -> float | None:
    """About how many seconds are left; None before the first epoch, or where only GPU-hours bound the search.

    Trials are taken to train as many epochs as those that have ended, and all of them while none has.
    """
    if not per_epoch or not wanted:
        return None
    if trials[-1].state is TrialState.CANCELLED:
        return 0.0
    ended = [trial for trial in trials if trial.state in {TrialState.DONE, TrialState.PRUNED}]
    usual = (
        sum(trial.epochs_done for trial in ended) / len(ended) if ended else trials[0].epochs * len(trials[0].curves)
    )
    open_epochs = sum(max(0.0, usual - trial.epochs_done) for trial in trials if trial.state is TrialState.OPEN)
    return (open_epochs + usual * max(0, wanted - len(trials))) * per_epoch

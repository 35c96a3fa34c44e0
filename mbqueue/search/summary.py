"""Summarise searches for `status`, from the trials in the queue."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mbqueue.search.trials import Trial, TrialState, best_of, needs_a_person, search_names, trials_of


def summaries(overview: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Summarise each search of an overview as a plain dictionary: ``searches[]`` in docs/reference/status-json.md."""
    bounds = {
        entry["trial"]["search"]: (entry["trial"]["of"], entry["trial"]["gpu_hours"] * 3600)
        for entry in overview["experiments"]
        if entry["trial"]
    }
    return [_summary(name, trials_of(overview, name), *bounds[name]) for name in search_names(overview)]


def _summary(name: str, trials: Sequence[Trial], wanted: int, budget_seconds: float) -> dict[str, Any]:
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
        "state": _state(trials, wanted, budget_seconds),
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
        "seconds_saved": saved * sum(trial.epoch_seconds for trial in trials) / epochs_done
        if saved and epochs_done
        else 0.0,
        "seconds_left": _left(trials, wanted, budget_seconds, per_epoch),
    }


def _state(trials: Sequence[Trial], wanted: int, budget_seconds: float) -> str:
    if any(trial.state is TrialState.OPEN and not trial.is_paused for trial in trials):
        return "running"
    if trials[-1].is_paused:
        return "paused"
    if trials[-1].state is TrialState.CANCELLED:
        return "cancelled"
    has_all = bool(wanted) and len(trials) >= wanted
    has_spent = bool(budget_seconds) and sum(trial.seconds for trial in trials) >= budget_seconds
    if has_all or has_spent:
        return "done"
    return "failed" if needs_a_person(trials) else "waiting"


def _left(trials: Sequence[Trial], wanted: int, budget_seconds: float, per_epoch: float) -> float | None:
    """Estimate the seconds of work that a search still needs; None before its first epoch.

    The estimate assumes that each trial trains for as many epochs as the ended trials did on average, or for all its
    epochs if no trial has ended. The estimate for trials that have not started is at most the remaining
    GPU-hours.
    """
    if not per_epoch:
        return None
    if trials[-1].state is TrialState.CANCELLED:
        return 0.0
    ended = [trial for trial in trials if trial.state in {TrialState.DONE, TrialState.PRUNED}]
    usual = (
        sum(trial.epochs_done for trial in ended) / len(ended) if ended else trials[0].epochs * len(trials[0].curves)
    )
    open_epochs = sum(max(0.0, usual - trial.epochs_done) for trial in trials if trial.state is TrialState.OPEN)
    to_begin = usual * max(0, wanted - len(trials)) * per_epoch if wanted else math.inf
    unspent = max(0.0, budget_seconds - sum(trial.seconds for trial in trials)) if budget_seconds else math.inf
    return open_epochs * per_epoch + min(to_begin, unspent)

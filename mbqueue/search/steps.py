"""Start the next trials of searches, and decide after each epoch of a trial whether to prune it.

Each trial starts exactly once, because its name contains its number, and the queue accepts each name only once. Each
epoch is judged exactly once, in the transaction that commits it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mbqueue.errors import ExperimentExists, counted
from mbqueue.experiment import Spec, parse_spec
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.enqueueing import Outcome
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.store import Queue
from mbqueue.search.file import Search
from mbqueue.search.study import is_unpromising, next_settings
from mbqueue.search.trials import Trial, TrialState, best_of, needs_a_person, search_names, trial_name, trials_of


def begin_trials(queue: Queue, *, results_dir: Callable[[str], str], now: float, by: str) -> list[str]:
    """Enqueue the next trial of every search that needs one; return the names of the trials that this session created.

    A search has one open trial per live session. With more open trials, the settings of each trial would be based on
    fewer results. With fewer open trials, some sessions would have no trial to train.

    Raises:
        SearchUnavailable: if a search needs another trial, and Optuna is not installed.
        SpecError: if the spec rejects all sampled settings.
    """
    begun = []
    for search, trials in _wanting(queue, now):
        spec = trial_spec(search, trials)
        if spec is None:
            continue
        try:
            outcome = queue.enqueue(
                spec, results_dir=results_dir(spec.name), priority=trials[-1].priority, now=now, by=by
            )
        except ExperimentExists:
            continue  # another session created this trial first
        if outcome.outcome is Outcome.CREATED:
            begun.append(spec.name)
    return begun


def wants_trial(queue: Queue, *, now: float) -> bool:
    return any(True for _ in _wanting(queue, now))


def _wanting(queue: Queue, now: float) -> Iterator[tuple[Search, list[Trial]]]:
    """Yield each search that needs another trial, with its existing trials."""
    newest: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for experiment in queue.trials():
        trial = experiment.spec["trial"]
        newest[trial["search"]["name"]] = (trial["number"], trial["search"])
    wanting = {
        name: search
        for name, (number, search) in newest.items()
        if not search["trials"] or number + 1 < search["trials"]
    }
    if not wanting:
        return
    overview = queue.overview(now=now)
    sessions = max(1, sum(session["state"] == "live" for session in overview["sessions"]))
    for name, content in wanting.items():
        search, trials = Search.model_validate(content), trials_of(overview, name)
        if _wants_another(search, trials, sessions):
            yield search, trials


def trial_spec(search: Search, trials: Sequence[Trial]) -> Spec | None:
    """Make the spec of the next trial; return None if no settings are left to try."""
    settings = next_settings(search, trials)
    if settings is None:
        return None
    number = trials[-1].number + 1 if trials else 0  # a rebuilt queue may lack some trials
    trial = {"search": search.to_json(), "number": number, "settings": settings}
    shown = ", ".join(f"{key} = {value}" for key, value in settings.items())
    return search.spec_with(
        settings,
        name=trial_name(search.name, number),
        results_name="",
        description=f"Trial {number} of {search.name}: {shown}",
        folds=search.folds,
        trial=trial,
    )


def verdict(queue: Queue, spec: Spec, *, fold: int, history: Sequence[Mapping[str, Any]], now: float) -> str | None:
    """Decide whether to prune a trial that is committing an epoch; return the reason, or None to continue training.

    Args:
        history: the fold's history, including the epoch being committed.

    Raises:
        SearchUnavailable: if Optuna is not installed.
    """
    if spec.trial is None:
        return None
    search = Search.model_validate(spec.trial.search)
    epoch = len(history)
    if search.pruner == "none":
        return None
    trials = trials_of(queue.overview(now=now), search.name)
    number = spec.trial.number
    own = next(trial for trial in trials if trial.number == number)
    if own.state is TrialState.PRUNED:
        return f"{PRUNED}another fold of the trial was pruned"
    curves = {**own.curves, fold: [row["val_mae"] for row in history]}
    is_trained = all(len(curve) == spec.train.epochs for curve in curves.values())
    judged = [replace(trial, curves=curves) if trial.number == number else trial for trial in trials]
    is_kept = queue.experiment(spec.name).spec["trial"]["kept"]  # the user can resume a pruned trial at any time
    if is_trained or is_kept or not is_unpromising(search, judged, number, fold):
        return None
    best = best_of(trials)
    beside = (
        ""
        if best is None
        else f"; the best of {counted(len(trials), 'trial')}, {best.experiment}, reached {best.value:.4f}"
    )
    reached = f"with a validation MAE of {min(curves[fold]):.4f}"
    return f"{PRUNED}{search.pruner} ends it after epoch {epoch} of fold {fold} {reached}{beside}"


def release_pruned(queue: Queue, *, after_seconds: float, now: float, by: str) -> list[str]:
    """Release the checkpoints of trials pruned more than ``after_seconds`` ago; return the names of these trials.

    The caller must remove the checkpoint files.
    """
    is_trial = {trial.name for trial in queue.trials() if not trial.is_released}
    due = [
        job.experiment
        for job in (queue.jobs(state=State.SKIPPED) if is_trial else ())
        if job.kind is Kind.RECORD and job.experiment in is_trial and job.changed_at <= now - after_seconds
    ]
    return [name for name in due if queue.discard_checkpoints(name, now=now, by=by)]


def judge_again(queue: Queue, *, now: float, by: str) -> list[str]:
    """Prune open trials that the pruner would prune at their current epoch, unless a session is training them.

    Call this function after rebuilding a queue from commits, because commits do not record pruning.

    Returns:
        The names of the pruned trials.

    Raises:
        SearchUnavailable: if an open trial must be judged, and Optuna is not installed.
    """
    overview, pruned = queue.overview(now=now), []
    for search in search_names(overview):
        for trial in trials_of(overview, search):
            if trial.state is not TrialState.OPEN:
                continue
            spec = parse_spec(queue.experiment(trial.experiment).spec, source=trial.experiment)
            for fold, curve in trial.curves.items():
                history = [{"val_mae": value} for value in curve]
                why = verdict(queue, spec, fold=fold, history=history, now=now) if history else None
                if why is not None and queue.prune(trial.experiment, why=why, now=now, by=by):
                    pruned.append(trial.experiment)
                    break
    return pruned


def _wants_another(search: Search, trials: Sequence[Trial], sessions: int) -> bool:
    if trials[-1].is_paused or trials[-1].state is TrialState.CANCELLED:
        return False
    if search.trials and len(trials) >= search.trials:
        return False
    if search.gpu_hours and sum(trial.seconds for trial in trials) >= search.gpu_hours * 3600:
        return False
    if needs_a_person(trials):
        return False
    return sum(trial.state is TrialState.OPEN for trial in trials) < sessions

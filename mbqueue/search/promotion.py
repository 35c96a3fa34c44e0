"""Make an experiment from the best settings that a search found."""

from __future__ import annotations

from mbqueue.errors import UsageError, counted
from mbqueue.experiment import Spec
from mbqueue.queue.store import Queue
from mbqueue.search.file import Search
from mbqueue.search.trials import best_of, trials_of
from mbqueue.task import N_FOLDS


def promoted(queue: Queue, search: str, *, name: str, now: float) -> Spec:
    """Return the spec of a search's base experiment with the settings of the best trial, on all folds.

    Raises:
        UsageError: if the search does not exist, or none of its trials is fully trained.
    """
    trials = trials_of(queue.overview(now=now), search)
    if not trials:
        raise UsageError(f"{search} is not a search. First enqueue a search: a file in jobs/ with the table [search].")
    best = best_of(trials)
    if best is None:
        raise UsageError(
            f"No trial of {search} has been fully trained yet. To see its progress, run: mbqueue status {search}"
        )
    found = Search.model_validate(queue.experiment(best.experiment).spec["trial"]["search"])
    return found.spec_with(
        best.settings,
        name=name,
        results_name="",
        description=(
            f"Best of {counted(len(trials), 'trial')} of {search} (trial {best.number}), chosen by validation on fold"
            f"{'s' * (len(found.folds) > 1)} {', '.join(map(str, found.folds))}"
        ),
        folds=list(range(N_FOLDS)),
        chosen={"search": search, "trial": best.number, "trials": len(trials), "folds": found.folds},
    )

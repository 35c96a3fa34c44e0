"""The `prepare` job, which reads and converts the crystals, and computes the frozen backbone's outputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mbqueue.data.folds import check_folds, smallest_validation_set
from mbqueue.errors import counted
from mbqueue.experiment import Spec
from mbqueue.queue.jobs import Lease
from mbqueue.results.members import enumerated, members_of
from mbqueue.session import derived_experiments
from mbqueue.session.session import Session
from mbqueue.session.working_set import WorkingSet
from mbqueue.task import Target

#: Below this number of validation crystals, chance decides which epoch has the lowest validation MAE.
_FEWEST_VALIDATION_CRYSTALS = 10


def run(session: Session, working_set: WorkingSet, lease: Lease) -> str:
    """Run a `prepare` job, commit it, and return a summary for the user.

    Raises:
        MembersNotRecorded, ResultsError: for the same reasons as in `derived_experiments.prepare`.
        DataError: if there are too few crystals for the folds, or the crystals are unusable.
        Stopped: if the session is asked to stop; finished shards are kept, and the next session computes the rest.
    """
    job = lease.job
    experiment, spec = session.experiment_of(job)
    if spec.made_from is not None:
        found = derived_experiments.prepare(session, spec)
        session.commit(lease, result=found)
        return f"made from {enumerated(members_of(experiment.spec))}, {counted(found['n'], 'crystal')}"
    data = working_set.data_for(job, experiment, spec)
    check_folds(data.crystals.targets, spec.train.validation, is_class=spec.predicts.is_class)
    # Trial 0 adds the note for all trials, unless they differ in the size of their validation sets.
    may_note = spec.trial is None or spec.trial.number == 0 or "train.validation" in spec.trial.search["space"]
    if spec.train.epochs > 1 and may_note:
        _note_few_validation_crystals(session, spec, data.crystals.targets)
    working_set.frozen_for(job, spec, data)
    # Other machines may need the crystals from the store, so wait until they are stored. A drive does not show when
    # other machines will see a file, so do not wait for a drive.
    if session.store is not None and not working_set.is_kept_for_others():
        raise session.stopped()
    widened = len(data.graphs.widened())
    result = {
        "dataset_hash": data.crystals.hash,
        "source": data.source,
        "official": data.official,
        "n": len(data.crystals),
        "widened": widened,
        "dropped": [list(entry) for entry in data.dropped],
    }
    session.commit(lease, result=result)
    text = f"{counted(len(data.crystals), 'crystal')} ready, {_told(data.crystals.targets, spec.predicts)}"
    if widened:
        text += f", {widened} with a widened cut-off so that no atom is isolated"
    if data.dropped:
        text += f", {len(data.dropped)} dropped as requested"
    return text


def _note_few_validation_crystals(session: Session, spec: Spec, targets: NDArray[np.float64]) -> None:
    n = smallest_validation_set(targets, spec.train.validation, spec.folds, is_class=spec.predicts.is_class)
    if n < _FEWEST_VALIDATION_CRYSTALS:
        session.report.note(
            f"{spec.name}: a validation set has only {counted(n, 'crystal')}, so the choice of the best epoch depends "
            f"on chance. Use more crystals, or raise train.validation (now {spec.train.validation:g})."
        )


def _told(targets: NDArray[np.float64], target: Target) -> str:
    """Summarise the targets, so that users notice a wrong column or unit before training."""
    if target.is_class:
        return f"{np.mean(targets):.1%} of them in class 1 ({target.name})"
    low, mean, high = (f"{value:.4g}" for value in (targets.min(), targets.mean(), targets.max()))
    return f"{target.name} {low} to {target.with_unit(high)}, mean {mean}"

"""A `predict` job: predict the test set of a fold with the model of its best epoch, or combine other experiments."""

from __future__ import annotations

import shutil

from mbqueue.queue.jobs import Kind, Lease, State
from mbqueue.results.tables import Predictions
from mbqueue.session import derived_experiments
from mbqueue.session.fold_results import FoldResults, commit_fold
from mbqueue.session.session import Session
from mbqueue.session.working_set import WorkingSet


def run(session: Session, working_set: WorkingSet, lease: Lease) -> str:
    """Run a `predict` job: write the fold's predictions and model, commit the job, and return the score as text.

    Raises:
        Stopped: if the session is asked to stop; the next session reuses finished predictions.
        Rewound: if checkpoints are damaged; the epochs after the newest intact checkpoint are queued again.
        MembersNotRecorded, ResultsError: for the same reasons as in `derived_experiments.predict`.
    """
    job = lease.job
    assert job.fold is not None
    experiment, spec = session.experiment_of(job)
    if spec.made_from is not None:
        return commit_fold(session, lease, experiment, derived_experiments.predict(session, working_set, lease, spec))
    fold = working_set.fold_run(lease, experiment, spec)
    # Remove temporary files that training left behind, because no later session loads this fold.
    session.while_held(lease, fold.checkpoints.sweep)
    session.require_epochs(lease, experiment, fold, _trained_epochs(session, experiment.name, job.fold))
    model = fold.best_model()
    keep_in = session.project.predictions_dir(experiment.name, f"fold_{job.fold}")
    predicted = fold.predict_test(
        model, should_stop=session.should_stop, on_progress=session.progress_of(job, "crystals"), keep_in=keep_in
    )
    if predicted is None:
        raise session.stopped()
    data = working_set.data_for(job, experiment, spec)
    tested = data.crystals.select(fold.rows.test)
    found = FoldResults(
        table=Predictions(tested.ids, tested.compositions(), tested.n_atoms, tested.targets, predicted),
        model=fold.family.model_bytes(model.cpu(), spec.predicts),
        history=fold.history(),
        absent_elements=fold.absent_elements,
    )
    told = commit_fold(session, lease, experiment, found)
    shutil.rmtree(keep_in, ignore_errors=True)
    return told


def _trained_epochs(session: Session, experiment: str, fold: int) -> int:
    """The last committed epoch of a fold, according to the queue; 0 if no epoch is committed."""
    jobs = session.queue.jobs(experiment=experiment, fold=fold, state=State.COMMITTED)
    return max((job.epoch or 0 for job in jobs if job.kind is Kind.TRAIN), default=0)

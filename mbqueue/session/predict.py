"""A `predict` job: the test part of a fold, by the model of its best epoch."""

from __future__ import annotations

import shutil

import numpy as np

from mbqueue.files import TEMP_PREFIX, fsync_dir, make_folder, write_bytes
from mbqueue.queue.jobs import Kind, Lease, State
from mbqueue.results.record import fold_facts
from mbqueue.results.scores import measures_of, score
from mbqueue.results.tables import (
    Predictions,
    history_file,
    model_file,
    predictions_file,
    write_history,
    write_predictions,
)
from mbqueue.session.shared_results import send_results
from mbqueue.session.workplace import Workplace
from mbqueue.task import target_of


def run(place: Workplace, lease: Lease) -> str:
    """Predict, write the fold's predictions and model, commit, and say the score.

    The files are made in a folder of their own and renamed while the lease is known to be held, the predictions last.

    Raises:
        Stopped: nothing was written.
        Rewound: checkpoints are damaged; the epochs after the newest whole one are queued again.
    """
    job = lease.job
    assert job.fold is not None
    experiment, spec = place.experiment_of(job)
    fold = place.fold_run(lease, experiment, spec)
    place.require_epochs(lease, experiment, fold, _trained_epochs(place, experiment.name, job.fold))
    model = fold.best_model()
    keep_in = place.project.predictions_dir(experiment.name, f"fold_{job.fold}")
    predicted = fold.predict_test(
        model, should_stop=place.should_stop, on_progress=place.progress_of(job, "crystals"), keep_in=keep_in
    )
    if predicted is None:
        raise place.stopped()

    data = place.data_for(job, experiment, spec)
    tested = data.crystals.select(fold.rows.test)
    table = Predictions(tested.ids, tested.compositions(), tested.n_atoms, tested.targets, predicted)
    folder = place.project.working_results(experiment.results_dir)
    staging = folder / f"{TEMP_PREFIX}fold_{job.fold}-fence_{lease.fence}"

    def sweep() -> None:
        for left_over in folder.glob(f"{TEMP_PREFIX}fold_{job.fold}-fence_*"):
            # Of a session that died, or that lost this job and may publish nothing any more.
            shutil.rmtree(left_over, ignore_errors=True)

    place.while_held(lease, sweep)
    make_folder(staging)
    try:
        write_bytes(model_file(staging, job.fold), fold.family.model_bytes(model.cpu(), spec.predicts))
        write_predictions(predictions_file(staging, job.fold), table)
        write_history(history_file(staging, job.fold), fold.history())
        facts = fold_facts(staging, job.fold)

        def publish() -> None:
            for name in (model_file, history_file, predictions_file):
                name(staging, fold.fold).replace(name(folder, fold.fold))
            staging.rmdir()  # here, so that a death right after the commit leaves nothing behind
            fsync_dir(folder)

        mae = float(np.mean(table.abs_error))
        result = {
            "test_mae": mae,
            "n_test": len(table),
            "absent_elements": list(fold.absent_elements),
            "files": facts,
        }
        if place.store is not None:
            send_results(place.store, experiment.name, staging, facts)
        place.commit(lease, result=result, publish=publish)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(keep_in, ignore_errors=True)
    target = target_of(experiment.spec)
    scores = score(table.y_true, table.y_pred, target)
    measure = next(one for one in measures_of(target) if scores[one.key] is not None)
    return f"test {measure.label} {target.with_unit(f'{scores[measure.key]:.4f}')} on {len(table)} crystals"


def _trained_epochs(place: Workplace, experiment: str, fold: int) -> int:
    """The last epoch of the fold that the queue holds for committed; 0 when there is none."""
    jobs = place.queue.jobs(experiment=experiment, fold=fold, state=State.COMMITTED)
    return max((job.epoch or 0 for job in jobs if job.kind is Kind.TRAIN), default=0)

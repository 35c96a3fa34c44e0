"""Commit a `predict` job: publish all files of the fold while the lease is held."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mbqueue.errors import counted
from mbqueue.files import TEMP_PREFIX, fsync_dir, make_folder, write_bytes
from mbqueue.queue.jobs import Experiment, Lease
from mbqueue.results.record import fold_checksums
from mbqueue.results.scores import measures_of, score
from mbqueue.results.tables import (
    Predictions,
    fold_files,
    history_file,
    model_file,
    predictions_file,
    write_history,
    write_predictions,
)
from mbqueue.session.session import Session
from mbqueue.session.shared_results import send_results
from mbqueue.storage.results import ResultFile
from mbqueue.task import target_of


@dataclass(frozen=True, kw_only=True)
class FoldResults:
    """The results of one fold.

    Attributes:
        table: predictions of the fold's test set.
        model: bytes of the model file; None for a blend, which has no model.
        history: one row per trained epoch.
        absent_elements: atomic numbers of elements missing from the fold's training set.
        more: other entries of the job's result.
    """

    table: Predictions
    model: bytes | None
    history: Sequence[Mapping[str, Any]]
    absent_elements: Sequence[int]
    more: Mapping[str, Any] = field(default_factory=dict)


def commit_fold(session: Session, lease: Lease, experiment: Experiment, found: FoldResults) -> str:
    """Write the fold's files, commit the job, and return the score as text.

    The files are first written to a temporary folder. While the session holds the lease, it moves the files to the
    results folder, predictions last.

    Raises:
        LeaseLost: if the lease is lost. The results folder is unchanged.
    """
    fold, spec = lease.job.fold, experiment.spec
    assert fold is not None
    folder = session.project.working_results(experiment.results_dir)
    staging = folder / f"{TEMP_PREFIX}fold_{fold}-fence_{lease.fence}"

    def sweep() -> None:
        for left_over in folder.glob(f"{TEMP_PREFIX}fold_{fold}-fence_*"):
            # The session that left this folder died or lost its lease, and may no longer publish the files.
            shutil.rmtree(left_over, ignore_errors=True)

    session.while_held(lease, sweep)
    make_folder(staging)
    try:
        if found.model is not None:
            write_bytes(model_file(staging, fold), found.model)
        write_predictions(predictions_file(staging, fold), found.table)
        write_history(history_file(staging, fold), found.history)
        checksums = fold_checksums(staging, fold, spec)

        def publish() -> None:
            for path in sorted(fold_files(staging, fold, spec), key=lambda path: path.name.startswith("preds")):
                path.replace(folder / path.name)
            staging.rmdir()  # remove the folder now, because a crash after the commit would leave it behind
            fsync_dir(folder)

        target = target_of(spec)
        scores = score(found.table.y_true, found.table.y_pred, target)
        result = {
            "test_mae": float(np.mean(found.table.abs_error)),
            **({"test_rocauc": scores["rocauc"]} if target.is_class else {}),
            "n_test": len(found.table),
            "absent_elements": list(found.absent_elements),
            **found.more,
            "files": checksums,
        }
        if session.store is not None:
            send_results(session.store, experiment.name, staging, ResultFile.all_in(checksums))
        session.commit(lease, result=result, publish=publish)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    measure = next(one for one in measures_of(target) if scores[one.key] is not None)
    told = target.with_unit(f"{scores[measure.key]:.4f}")
    return f"test {measure.label} {told} on {counted(len(found.table), 'crystal')}"

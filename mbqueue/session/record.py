"""The `record` job: compute the experiment's scores, and write its result files and the leaderboard file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbqueue.errors import ResultsError, counted
from mbqueue.files import make_folder
from mbqueue.queue.jobs import Lease
from mbqueue.results.cells import spread
from mbqueue.results.record import broken_folds, record_experiment
from mbqueue.results.scores import measures_of
from mbqueue.session.record_inputs import fingerprint_changes, record_inputs, written_checksums
from mbqueue.session.session import Rewound, Session
from mbqueue.session.shared_results import fetch_results, recorded_checksums, send_results
from mbqueue.session.working_set import WorkingSet
from mbqueue.storage.commits import Commits
from mbqueue.storage.places import place_of
from mbqueue.storage.results import ResultFile
from mbqueue.task import target_of


def run(session: Session, _working_set: WorkingSet, lease: Lease) -> str:
    """Score the folds, write results.json, RESULTS.md and matbench's file, commit the job, and return the score.

    Raises:
        Rewound: if a fold's files are missing or damaged; the fold is predicted again from its checkpoints.
    """
    experiment, spec = session.experiment_of(lease.job)
    folder = session.project.working_results(experiment.results_dir)
    make_folder(folder)
    if session.store is not None:
        try:
            fetch_results(session.store, experiment, session.queue.jobs(experiment=experiment.name), folder)
        except ResultsError as error:
            session.report.note(str(error))  # the check below rewinds each fold whose files are missing
    written = written_checksums(session.queue.jobs(experiment=experiment.name))
    broken = broken_folds(folder, spec.folds, experiment.spec, checksums=written)
    if broken:
        session.queue.rewind(experiment.name, broken, to_epoch=spec.train.epochs, now=session.clock.now(), lease=lease)
        raise Rewound(f"{' '.join(broken.values())} mbqueue recreates missing files from the checkpoints.")

    def commit(content: dict[str, Any], publish: Callable[[], None]) -> None:
        result: dict[str, Any] = {}
        for name, score in content["summary"].items():
            if score is not None:
                result |= {name: score["mean"], f"{name}_std": score["std"]}
        if session.store is not None:
            # Other machines do not see the results folder, so the files are sent to the store before the commit.
            session.while_held(lease, publish)
            result["files"] = recorded_checksums(folder, content)
            send_results(session.store, experiment.name, folder, ResultFile.all_in(result["files"]))
            session.commit(lease, result=result)
            return
        session.commit(lease, result=result, publish=publish)

    def passed_over(stem: str, why: str) -> None:
        lost = "The results do not mention a change of device or library that only this commit recorded."
        session.damaged(lease, f"The commit {stem} is skipped: {why} {lost}")

    folds = [experiment.identity(fold) for fold in spec.folds]
    commits = {one.fold: Commits(place_of(session.project, session.store, one), one, passed_over) for one in folds}
    changes = fingerprint_changes(commits)
    inputs = record_inputs(session.queue, experiment, now=session.clock.now(), fingerprint_changes=changes)
    content = record_experiment(folder, inputs, commit=commit)
    target = target_of(experiment.spec)
    measure = next(one for one in measures_of(target) if content["summary"][one.key] is not None)
    score = content["summary"][measure.key]
    told = target.with_unit(spread(score, len(spec.folds)))
    return f"{measure.label} {told} over {counted(len(spec.folds), 'fold')}; see {experiment.results_dir}"

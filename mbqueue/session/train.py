"""A `train` job: one epoch of one fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbqueue.errors import counted
from mbqueue.experiment import Spec
from mbqueue.history import is_out_of_patience
from mbqueue.queue.jobs import Lease
from mbqueue.results.tables import history_file, write_history
from mbqueue.session.searching import verdict
from mbqueue.session.session import Session
from mbqueue.session.working_set import WorkingSet
from mbqueue.storage.own_commits import Staged
from mbqueue.train.fold import FoldRun
from mbqueue.train.outcome import StepReport

#: The number of recent steps to average when predicting how long the next step takes.
_STEPS_REMEMBERED = 20


def run(session: Session, working_set: WorkingSet, lease: Lease) -> str:
    """Train and commit the job's epoch, starting from its newest checkpoint if there is one; return a summary.

    Raises:
        Stopped: if the session is asked to stop; the steps so far are committed.
        Rewound: if checkpoints are damaged; the epochs after the newest intact checkpoint are queued again.
    """
    job = lease.job
    assert job.fold is not None
    assert job.epoch is not None
    experiment, spec = session.experiment_of(job)
    fold = working_set.fold_run(lease, experiment, spec)
    session.require_epochs(lease, experiment, fold, job.epoch - 1)
    return _Epoch(session, lease, spec, fold, experiment.results_dir).run()


class _Epoch:
    """Trains the epoch of one lease, and updates the queue, the display and the results folder."""

    def __init__(self, session: Session, lease: Lease, spec: Spec, fold: FoldRun, results_dir: str) -> None:
        self._session, self._lease, self._spec, self._fold = session, lease, spec, fold
        self._history_path = history_file(session.project.working_results(results_dir), fold.fold)
        self._step_seconds = 0.0
        self._checkpoint_seconds = 0.0
        self._is_committed = False
        #: Why the fold's later epochs are skipped; None if no epochs are skipped.
        self._skips: str | None = None

    def run(self) -> str:
        session, job = self._session, self._lease.job
        assert job.epoch is not None
        outcome = self._fold.run_epoch(
            job.epoch,
            fence=self._lease.fence,
            session=session.id,
            # Do not start a step that cannot finish and be saved before the deadline.
            should_stop=lambda: session.stop_reason(self._step_seconds) is not None,
            on_step=self._tell,
            save=self._save,
            checkpoint_seconds=session.project.settings.checkpoint_minutes * 60,
        )
        if not outcome.finished:
            raise session.stopped()
        assert outcome.history_row is not None
        assert outcome.best is not None
        if not self._is_committed:
            # An earlier session published this epoch's commit, but died before it updated the queue, so adopt the
            # commit.
            history = self._fold.history()
            self._commit(history, outcome.best["epoch"], lambda: write_history(self._history_path, history))
        session.report.epoch_finished(job, outcome.history_row, is_best=outcome.improved)
        said = f"committed; best epoch so far {outcome.best['epoch']}"
        return f"{said}; {self._skips}" if self._skips else said

    def _save(self, staged: Staged) -> None:
        """Publish a commit while the lease is held. If the epoch is finished, the commit ends the job."""
        manifest, clock = staged.manifest, self._session.clock
        began = clock.monotonic()

        def publish() -> None:
            staged.publish()
            if manifest.complete:
                write_history(self._history_path, manifest.history)

        if manifest.complete:
            assert manifest.best is not None
            self._commit(manifest.history, manifest.best["epoch"], publish)
        else:
            progress: dict[str, Any] = {"what": "step", "done": manifest.step, "total": manifest.steps_per_epoch}
            progress["seconds"] = self._session.heartbeat.seconds
            self._session.queue.save_progress(self._lease, progress=progress, publish=publish)
        seconds = clock.monotonic() - began
        self._checkpoint_seconds += seconds
        self._session.saved(seconds)

    def _commit(self, history: list[dict[str, Any]], best_epoch: int, publish: Callable[[], None]) -> None:
        patience = self._spec.train.patience
        if is_out_of_patience(patience, epoch=history[-1]["epoch"], best=best_epoch):
            self._skips = f"early stopping: no improvement for {counted(patience, 'epoch')} after epoch {best_epoch}"
        pruned = verdict(self._session, self._spec, self._fold.fold, history)
        self._skips = pruned or self._skips
        result = {**history[-1], "best_epoch": best_epoch, "checkpoint_seconds": self._checkpoint_seconds}
        self._session.commit(
            self._lease, result=result, publish=publish, skip_rest=self._skips, prunes=pruned is not None
        )
        self._is_committed = True

    def _tell(self, step: StepReport) -> None:
        self._step_seconds += (step.seconds - self._step_seconds) / min(step.step, _STEPS_REMEMBERED)
        rate = step.structures / step.seconds if step.seconds > 0 else 0.0
        self._session.heartbeat.show({"what": "step", "done": step.step, "total": step.steps_per_epoch}, rate)
        figures = {"loss": step.loss, "MAE": step.mae, "structures/s": rate}
        self._session.report.advanced(self._lease.job, "step", step.step, step.steps_per_epoch, figures)

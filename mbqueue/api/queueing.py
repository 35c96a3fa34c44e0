"""Putting experiments into the queue, steering them, and seeing where they stand."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbqueue.api.opened import OpenedProject, tell
from mbqueue.dashboard.snapshot import Status
from mbqueue.errors import StoreError, UsageError
from mbqueue.queue.jobs import Event
from mbqueue.queue.opening import open_queue, require_content, require_no_cut_off_restore

if TYPE_CHECKING:
    from mbqueue.queue.enqueue import EnqueueOutcome


class Queueing(OpenedProject):
    """enqueue, pause, resume, cancel, retry, set_priority; status, events, watch."""

    def enqueue(
        self,
        experiment: str | Path,
        *,
        folds: Iterable[int] | None = None,
        epochs: int | None = None,
        dataset: str | Path | None = None,
        priority: int = 0,
        settings: Mapping[str, Any] | None = None,
        name: str | None = None,
        drop_invalid: bool = False,
    ) -> EnqueueOutcome:
        """Put an experiment into the queue; the same again changes nothing, more folds are added to what is there.

        Args:
            experiment: its name in jobs/, or a TOML file.
            folds, epochs, dataset, drop_invalid: in place of what the file says.
            priority: higher is worked on first.
            settings: other keys in place of what the file says, like ``{"train.lr": 3e-4}``.
            name: another name, for the queue and the results folder.

        Raises:
            SpecError: when the file or a key is wrong.
            ExperimentExists: when the name is taken by another spec; the message lists what differs.
            UsageError, DataError: when the experiment or its dataset does not exist, or a restore was cut off.
        """
        # pydantic builds the checks when this is imported; reading commands need not wait for that.
        from mbqueue.data.datasets import check_dataset  # noqa: PLC0415
        from mbqueue.experiment import load_spec  # noqa: PLC0415

        overrides = dict(settings or {})
        if folds is not None:
            overrides["folds"] = list(folds)
        if epochs is not None:
            overrides["train.epochs"] = epochs
        if dataset is not None:
            overrides["data.dataset"] = str(dataset)
        if drop_invalid:
            overrides["data.drop_invalid"] = True
        if name is not None:
            overrides = {"results_name": name} | overrides | {"name": name}
        spec = load_spec(self.folder.experiment_file(str(experiment)), overrides=overrides)
        check_dataset(spec.data.dataset, project_root=self.folder.root)
        now = self._clock.now()
        day = datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d")
        results_dir = self.folder.results_folder(day, spec.folder_name)
        require_no_cut_off_restore(self.folder)
        with open_queue(self.folder) as queue:
            outcome = queue.enqueue(spec, results_dir=results_dir, priority=priority, now=now)
            self._keep_wanted(queue, spec.name)
        self._publish()
        return outcome

    def pause(self, experiment: str, *, fold: int | None = None) -> int:
        """Hand out no more of it; a running epoch is checkpointed and given back. Returns the number of jobs."""
        with self._writing_queue(experiment) as queue:
            return queue.pause(experiment, fold=fold, now=self._clock.now())

    def resume(self, experiment: str, *, fold: int | None = None) -> int:
        """Undo `pause`. Returns the number of jobs."""
        with self._writing_queue(experiment) as queue:
            return queue.resume(experiment, fold=fold, now=self._clock.now())

    def cancel(self, experiment: str, *, fold: int | None = None) -> int:
        """Do none of what is left of it; what is committed stays. Returns the number of jobs."""
        with self._writing_queue(experiment) as queue:
            return queue.cancel(experiment, fold=fold, now=self._clock.now())

    def retry(self, experiment: str, *, fold: int | None = None) -> int:
        """Give failed and cancelled jobs all their attempts again, and make lost result files again.

        A fold whose recorded files are gone or damaged is predicted again from its checkpoints. Where these are in an
        object store that does not answer, that is left out, and told.

        Returns:
            The number of jobs that will be done again.
        """
        with self._writing_queue(experiment) as queue:
            changed = queue.retry(experiment, fold=fold, now=self._clock.now())
            try:
                lost_folds = self._lost_folds(queue, experiment)
            except StoreError as error:  # what is retried stays so
                lost_folds = {}
                tell(f"{error} Whether result files are lost could not be seen; for those, retry again once it can be.")
            again = {lost: why for lost, why in lost_folds.items() if fold in (None, lost)}
            epochs = queue.experiment(experiment).spec["train"]["epochs"]
            return changed + queue.rewind(experiment, again, to_epoch=epochs, now=self._clock.now(), by="retry")

    def set_priority(self, experiment: str, priority: int, *, fold: int | None = None) -> int:
        """Set how urgent it is, from the next claim on. Returns the number of jobs."""
        with self._writing_queue(experiment) as queue:
            return queue.set_priority(experiment, priority, fold=fold, now=self._clock.now())

    def status(self, experiment: str | None = None) -> Status:
        """Where everything stands, or one experiment.

        Raises:
            QueueError: when nothing was ever enqueued.
            UsageError: when there is no such experiment; lists those there are.
        """
        with self._reading_queue(experiment) as queue:
            require_content(self.folder, queue)
            overview = queue.overview(now=self._clock.now(), project=str(self.folder.root), experiment=experiment)
        if self.folder.store:
            from mbqueue.session.storewatch import store_status  # noqa: PLC0415 - only for projects with a store

            overview["publishing"] = store_status(self.folder)
        elif self.folder.publishes:
            from mbqueue.drive.livestate import publishing_status  # noqa: PLC0415 - only for projects on a drive

            overview["publishing"] = publishing_status(self.folder)
        return Status(overview=overview, session_seconds=self.folder.settings.session_seconds)

    def events(
        self, experiment: str | None = None, *, since: float = 0.0, after: int = 0, limit: int = 50
    ) -> tuple[Event, ...]:
        """The newest changes of jobs' states, oldest of them first.

        Args:
            since: seconds since the epoch. after: id of the last event already seen. limit: at most so many.
        """
        with self._reading_queue(experiment) as queue:
            return queue.events(experiment=experiment, since=since, after=after, limit=limit)

    def watch(self, experiment: str | None = None, *, seconds: float = 5.0) -> None:
        """Show the status in a notebook's cell and renew it in place, until no session is at work or Ctrl-C.

        Args:
            seconds: between two looks.

        Raises:
            UsageError: outside of a notebook; there, `mbqueue status --watch` does it.
        """
        try:
            from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415
        except ImportError as error:
            raise UsageError("watch() is for notebooks. In a terminal use: mbqueue status --watch") from error
        status = self.status(experiment)
        handle = display(status, display_id=True)  # type: ignore[no-untyped-call, unused-ignore]
        try:
            while handle is not None and status.is_active:
                time.sleep(seconds)
                status = self.status(experiment)
                handle.update(status)
        except KeyboardInterrupt:
            return

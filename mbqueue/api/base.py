"""The base class of the API, which stores the project's folder and the clock. Each call opens the queue."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mbqueue.clock import SystemClock
from mbqueue.errors import QueueLost, ResultsError, StoreError
from mbqueue.project import ProjectFolder, find_project
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.opening import anything, nothing, open_queue
from mbqueue.queue.store import Queue
from mbqueue.search.trials import experiments_of

#: The first message that a session or a prediction shows. Loading PyTorch and CHGNet takes a few seconds, or up to a
#: minute from a cold disk.
LOADING = "loading PyTorch and CHGNet"

_log = logging.getLogger("mbqueue")


def tell(text: str) -> None:
    """Log a note with Python's logging, which writes to standard error unless the program configures it."""
    _log.warning(text)


class OpenedProject:
    def __init__(self, path: str | Path | None = None, *, while_away: bool = False) -> None:
        self.folder: ProjectFolder = find_project(None if path is None else Path(path), while_away=while_away)
        self._clock = SystemClock()
        if self.folder.topology.is_mirrored and self.folder.away is None:
            from mbqueue.drive.reentry import enter  # noqa: PLC0415 - only projects on a drive need it

            enter(self.folder, note=tell, clock=self._clock)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder.root)!r})"

    @contextmanager
    def _reading_queue(self, experiment: str | None, *, before_adding: bool = False) -> Iterator[Queue]:
        refuses = anything if before_adding else nothing
        with open_queue(self.folder, read_only=True, refuses=refuses) as queue:
            if experiment is not None:
                for name in experiments_of(queue, experiment):
                    queue.experiment(name)  # an unknown name raises an error that lists the known names
            yield queue

    @contextmanager
    def _writing_queue(self, experiment: str) -> Iterator[Queue]:
        # A command that only changes jobs must not create a queue.
        open_queue(self.folder, read_only=True, refuses=lambda lost: lost.concerns(experiment)).close()
        with open_queue(self.folder) as queue:
            yield queue
            for name in experiments_of(queue, experiment):
                self._keep_note(queue, name)
        self._publish()

    def _keep_note(self, queue: Queue, experiment: str) -> None:
        """Update an experiment's note, so that `recover` can restore the user's requests.

        If the file cannot be written, mbqueue only logs a message.
        """
        from mbqueue.drive.notes import keep_note  # noqa: PLC0415 - reading commands need not wait for it

        try:
            keep_note(self.folder, queue, experiment)
        except OSError as error:
            tell(f"{self.folder.notes_dir} cannot be written ({error}), so mbqueue recover cannot restore this change.")

    def _require_no_earlier_commits(self, queue: Queue) -> None:
        """With an object store, refuse to start a new queue if the store has commits from an earlier queue."""
        if not (self.folder.topology.store and queue.is_empty()):
            return
        from mbqueue.session.shared_commits import finished_epochs  # noqa: PLC0415 - only projects with a store need it
        from mbqueue.storage.objects import store_of  # noqa: PLC0415

        store, names = store_of(self.folder.topology), list[str]()
        assert store is not None
        with contextlib.suppress(StoreError):  # the first session reports a store that is new or unavailable
            names = sorted({experiment for experiment, _ in finished_epochs(store)})
        if names:
            raise QueueLost(
                f"{store.url} contains commits of {names[0]}{' and others' * (len(names) > 1)}, and this queue is new, "
                "so a previous queue was lost. Nothing was changed. First rebuild the previous queue: "
                f"{self.folder.topology.how_to_recover}. For a new project, set a different prefix in `store`."
            )

    def _publish(self) -> None:
        """Publish the changes of a project on a drive; if the mount fails, a later call publishes them."""
        if self.folder.topology.is_mirrored:
            from mbqueue.drive.publishing import Publisher  # noqa: PLC0415 - only projects on a drive need it

            Publisher(self.folder, None, note=tell, clock=self._clock).round()

    def _bring_results(self, queue: Queue, experiment: str) -> None:
        """With an object store, fetch an experiment's results that other machines recorded."""
        from mbqueue.session.commits_binding import opened_store  # noqa: PLC0415 - status need not wait for it

        store = opened_store(self.folder, queue)
        if store is not None:
            from mbqueue.session.shared_results import fetch_results  # noqa: PLC0415

            entry, jobs = queue.experiment(experiment), queue.jobs(experiment=experiment)
            fetch_results(store, entry, jobs, self.folder.working_results(entry.results_dir))

    def _newest_results(self, results_dir: str) -> Path:
        """The folder with an experiment's newest result files.

        A project on a drive has two results folders. Return the folder with the newer results or, on a tie, the live
        folder. If no results are recorded, return the folder where sessions on this machine write results.
        """
        from mbqueue.results.folder import recorded_at  # noqa: PLC0415
        from mbqueue.results.record import RESULTS_FILE  # noqa: PLC0415

        working, published = self.folder.working_results(results_dir), self.folder.root / results_dir
        recorded = [folder for folder in (working, published) if (folder / RESULTS_FILE).is_file()]
        if recorded:
            return max(recorded, key=recorded_at)
        return working if working.is_dir() else published

    def _lost_folds(self, queue: Queue, experiment: str) -> dict[int, str]:
        """Return the folds whose result files are incomplete or damaged, and what is wrong with each.

        If only files of the `record` job are lost, return the first fold: predicting any fold again also repeats
        `record`.
        """
        from mbqueue.results.folder import read_recorded  # noqa: PLC0415
        from mbqueue.results.record import broken_folds  # noqa: PLC0415
        from mbqueue.session.record_inputs import written_checksums  # noqa: PLC0415

        with contextlib.suppress(ResultsError):  # the check below finds files that could not be fetched
            self._bring_results(queue, experiment)
        jobs = queue.jobs(experiment=experiment, state=State.COMMITTED)
        entry = queue.experiment(experiment)
        folder = self._newest_results(entry.results_dir)
        predicted = [job.fold for job in jobs if job.kind is Kind.PREDICT and job.fold is not None]
        lost = broken_folds(folder, predicted, entry.spec, checksums=written_checksums(jobs))
        if not lost and any(job.kind is Kind.RECORD for job in jobs):
            try:
                read_recorded(folder)
            except ResultsError as error:
                lost = {predicted[0]: str(error)}
        return lost

"""Publish committed work to the mount while training continues.

One round publishes all committed work that is not on the mount yet. Commits come first (each fold's best before its
newest), then results, then a snapshot of the queue. The snapshot therefore never mentions missing files. A superseded
file is removed only after its successor has been read back and has had time to upload. If the mount fails, training
continues, and `mbqueue status` shows the reason. mbqueue retries a failed round with increasing delays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

from filelock import FileLock, Timeout

from mbqueue import files
from mbqueue.clock import Clock, backoff
from mbqueue.drive.announcements import Announcement
from mbqueue.drive.livestate import LiveState, agree_on_project, as_published
from mbqueue.drive.other_sessions import OtherSessions
from mbqueue.drive.outcomes import (
    ResultListing,
    chain_of,
    enqueued_record,
    histories_of,
    result_files,
    why_pruned,
)
from mbqueue.drive.publish_times import NoTime, RoundTimes, WriteTime
from mbqueue.drive.reentry import Reentry
from mbqueue.drive.retention import SETTLED_SECONDS
from mbqueue.drive.snapshots import take
from mbqueue.drive.timed_drive import TimedDrive
from mbqueue.errors import QueueError
from mbqueue.project import ProjectFolder, fold_name
from mbqueue.queue.jobs import Experiment, Job, Kind, State
from mbqueue.queue.store import Queue
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Damaged, Manifest
from mbqueue.storage.mounted import Drive
from mbqueue.storage.places import in_folder
from mbqueue.storage.results import total_bytes

#: Seconds between rounds of publishing while the mount is working.
ROUND_SECONDS = 15.0
#: Seconds before a failed round of publishing is retried. The pause doubles after each failure, up to
#: `LONGEST_RETRY_SECONDS`.
RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 300.0
#: Seconds between snapshots while a session is running.
SNAPSHOT_SECONDS = 60.0
#: Seconds between reads of what other sessions have published.
RECONCILE_SECONDS = 30.0
#: The longest time, in seconds, that training waits for a read of what other sessions have published.
READ_SECONDS = 30.0
#: Before its first claim, a session waits at most this long for the publishing round that detects other sessions.
FIRST_ROUND_SECONDS = 60.0
#: How many seconds the last round of publishing may take, unless the session's deadline is earlier.
LAST_ROUND_SECONDS = 600.0


class Publisher:
    """Publishes the content of one live folder, either in a thread (as a context manager) or through calls to `round`.

    Any number of sessions may share a live folder, but only one publishes at a time.

    Args:
        session: the publishing session; None for a command, which does not announce itself.
        remaining: returns the seconds until the session must end. A write starts only if enough seconds remain.
        should_stop: returns whether the session was asked to end, so that its main thread stops waiting for the mount.
        on_published: called with the duration of each round that wrote something.
        note: called from the publishing thread with sentences for the user.
    """

    def __init__(
        self,
        project: ProjectFolder,
        session: str | None,
        *,
        clock: Clock,
        note: Callable[[str], None],
        remaining: Callable[[], float] = lambda: float("inf"),
        should_stop: Callable[[], bool] = lambda: False,
        on_published: Callable[[float], None] = lambda _seconds: None,
        drive: Drive | None = None,
    ) -> None:
        self._project, self._session, self._clock, self._note = project, session, clock, note
        self._remaining, self._should_stop, self._on_published = remaining, should_stop, on_published
        self._drive = drive or Drive(project.root)
        self._sealed = project.live_dir / f"{files.TEMP_PREFIX}snapshot.db"
        self._reentry = Reentry(project, self._drive, note=note, clock=clock)
        # The main thread must not wait for the mount. Threads cannot share a reader, so the main thread has its own.
        self._read = TimedDrive(self._drive, should_stop=should_stop)
        self._beside = Reentry(project, self._read, note=note, clock=clock)
        self._other_sessions = OtherSessions(project, self._drive, clock=clock, note=note)
        self._snapshot_at: float | None = None
        self._reconciled_at: float | None = None
        self._failures = 0
        self._steady_since = clock.monotonic()
        self._wrote = False
        self._write_time = WriteTime()
        self._round_times = RoundTimes(session)
        self._wake, self._over, self._begun = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="mbqueue-publish", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        end = time.monotonic() + min(FIRST_ROUND_SECONDS, self._remaining())
        while not self._begun.wait(0.1) and time.monotonic() < end and not self._should_stop():
            pass
        return self

    def __exit__(self, *_exception: object) -> None:
        """Publish the remaining work while there is time; abandon a mount that hangs."""
        self._over.set()
        self._wake.set()
        self._thread.join(min(LAST_ROUND_SECONDS, max(5.0, self._remaining())))
        if self._thread.is_alive():
            self._note(f"{self._project.root} is not responding. Unpublished work stays in {self._project.live_dir}.")

    def wake(self) -> None:
        """Request an early publishing round for newly committed work."""
        self._wake.set()

    @property
    def others(self) -> list[Announcement]:
        """The sessions with other databases of this project that were live in the last publishing round."""
        return self._other_sessions.living

    @property
    def active_others(self) -> list[Announcement]:
        """The other sessions that are known to be alive (see `OtherSessions.active`)."""
        return self._other_sessions.active

    def reconcile(self, queue: Queue, *, now: float, spare: float = READ_SECONDS) -> list[tuple[int, int]]:
        """Adopt work that other sessions have published; do nothing while the mount is failing or hanging.

        Separate threads read the mount, and are abandoned if they take too long. Only the calling thread writes to the
        queue.

        Args:
            now: monotonic seconds. A call within `RECONCILE_SECONDS` of the previous call does nothing.
            spare: how many seconds the call may take, at most `READ_SECONDS`.

        Returns:
            (experiment id, fold) of the adopted folds.
        """
        is_early = self._reconciled_at is not None and now - self._reconciled_at < RECONCILE_SECONDS
        if is_early or spare <= 0:
            return []
        self._reconciled_at = now
        taken: list[tuple[int, int]] = []
        try:
            with self._read.within(min(READ_SECONDS, spare)):
                self._read.check()
                self._beside.reconcile(queue, by=self._session or "restore", on_taken=taken.append)
        except InterruptedError:
            pass  # a request to stop is not a failure
        except OSError as error:
            if isinstance(error, TimeoutError):
                self._reconciled_at = now + LONGEST_RETRY_SECONDS
            self._trouble(
                f"{self._project.root} cannot be read: {error}; mbqueue will adopt the work of other sessions later"
            )
        return taken

    def round(self, *, ended: str | None = None) -> bool:
        """Publish everything that is committed; return whether all of it is on the mount.

        Args:
            ended: why the session ended, if this is its last round.
        """
        began = self._clock.monotonic()
        self._wrote = False
        try:
            with FileLock(self._project.publishing_lock, timeout=0 if ended is None else 60):
                self._publish_all(final=ended is not None)
                if self._session is not None:
                    with Queue(self._project.queue_db) as queue:
                        self._other_sessions.meet(queue, self._session, ended)
        except Timeout:
            return False  # another session on this machine is publishing
        except NoTime as error:
            self._trouble(f"the session has no time left: {error}")
            return False
        except (OSError, QueueError) as error:
            self._trouble(str(error))
            return False
        except Exception as error:  # noqa: BLE001 - the thread must report any error and keep running
            self._trouble(f"publishing failed, {type(error).__name__}: {error}")
            return False
        if self._wrote:
            seconds = self._clock.monotonic() - began
            self._on_published(seconds)
            self._round_times.took(seconds, ended_at=self._clock.now())
        return True

    def _run(self) -> None:
        while not self._over.is_set():
            if self.round():
                self._failures, pause = 0, ROUND_SECONDS
            else:
                self._failures += 1
                pause = backoff(self._failures, first=RETRY_SECONDS, longest=LONGEST_RETRY_SECONDS)
            self._begun.set()
            self._wake.wait(pause)
            if self._failures:
                # Wait after a failure, even if a new commit woke the thread.
                self._over.wait(0 if self._over.is_set() else RETRY_SECONDS)
            self._wake.clear()
        self.round(ended="the session is over")
        with suppress(OSError, QueueError), Queue(self._project.queue_db) as queue:
            self._round_times.note(queue)  # record the last round, for this machine's timeline only

    def _publish_all(self, *, final: bool) -> None:
        agree_on_project(self._project, self._drive)
        for left in self._project.live_dir.glob(f"{self._sealed.name}*"):
            left.unlink()  # only one session publishes at a time, so a dead session left this file
        with LiveState.changing(self._project.publishing_file) as state:
            published_event = state.last_event
        there: dict[str, dict[str, Any]] = {}
        aside: list[str] = []
        with Queue(self._project.queue_db) as queue:
            last_event = self._seal(queue, published_event, final=final)
            experiments = {one.name: one for one in queue.experiments()}
            jobs = {name: queue.jobs(experiment=name) for name in experiments}
            records = {}
            for name, experiment in experiments.items():
                records[name] = enqueued_record(experiment, jobs[name]) | why_pruned(jobs[name])
                for fold in experiment.spec["folds"]:
                    newest, others = self._publish_fold(experiment, fold)
                    aside += others
                    if newest is not None:
                        there[f"{name}/{fold_name(fold)}"] = as_published(newest)
                self._publish_outcomes(experiment, jobs[name], records[name])
            with LiveState.changing(self._project.publishing_file) as state:
                state.commits |= there
                state.aside = aside
            if last_event is not None:
                self._publish_snapshot(last_event, list(records.values()))
        with LiveState.changing(self._project.publishing_file) as state:
            was_in_trouble, state.trouble = state.trouble is not None, None
            state.published_at = self._clock.now()
        if was_in_trouble:
            self._note("The mount is back, and all committed work is published.")

    def _seal(self, queue: Queue, published_event: int, *, final: bool) -> int | None:
        """Take a snapshot if one is due and the queue has new events. Return the id of the last event, or None."""
        now = self._clock.monotonic()
        due = self._snapshot_at is None or final or now - self._snapshot_at >= SNAPSHOT_SECONDS
        if not due or _last_event(queue) == published_event:
            return None
        self._round_times.note(queue)
        last_event = _last_event(queue)
        take(self._project.queue_db, self._sealed)
        return last_event

    def _publish_snapshot(self, last_event: int, experiments: list[dict[str, Any]]) -> None:
        state = LiveState.load(self._project.publishing_file)  # only this thread changes the fields used below
        fields = {
            "number": state.number + 1,
            "database": state.database,
            "ancestry": state.ancestry,
            "session": self._session or "",
            "taken_at": self._clock.now(),
            "last_event": last_event,
            "experiments": experiments,
        }
        with self._writing(self._sealed.stat().st_size):
            published = self._reentry.snapshots.publish(self._sealed, fields)
        self._sealed.unlink(missing_ok=True)
        with LiveState.changing(self._project.publishing_file) as state:
            state.number, state.last_event = published.listing.number, last_event
        self._snapshot_at = self._clock.monotonic()
        self._reentry.snapshots.prune(published.listing, now=self._clock.monotonic(), steady_since=self._steady_since)

    def _publish_fold(self, experiment: Experiment, fold: int) -> tuple[Manifest | None, list[str]]:
        """Publish a fold's newest commit and the commit of its best epoch.

        Returns:
            the manifest of the newest published commit (None if there is none); the paths of all commits on the mount
            that belong to a different training run of this fold.
        """
        published = self._reentry.published_fold(experiment.identity(fold))
        if experiment.is_released:
            # Remove the files only after the snapshot with the trial's histories has had time to upload.
            if self._clock.now() - experiment.spec["trial"]["released"]["at"] >= SETTLED_SECONDS:
                # Remove only this trial's commits: another machine may have a trial with the same name but
                # different settings.
                for commit in published.commits():
                    published.remove(commit)
            return None, []
        newest = None
        identity = experiment.identity(fold)
        here = Commits(in_folder(self._project.checkpoints_dir(experiment.name, fold)), identity)
        found = here.commits()
        for commit in (one for one in found if one.manifest.stem in found[-1].manifest.needed_stems):
            if not published.has(commit):
                try:
                    checkpoint = here.checkpoint(commit)
                except Damaged:
                    continue  # a session has removed the commit as superseded, or has set it aside as damaged
                with self._writing(commit.manifest.size):
                    published.put(commit, checkpoint)
            newest = commit.manifest
        if newest is None:
            return None, []
        commits = published.commits()
        if self._session is not None:  # only a session knows how long the commits have been on the mount
            published.retire(newest, now=self._clock.monotonic(), steady_since=self._steady_since)
        return newest, [
            published.place.path(commit.base)
            for commit in commits
            if not commits[-1].manifest.continues(commit.manifest)
        ]

    def _publish_outcomes(self, experiment: Experiment, jobs: Sequence[Job], enqueued: dict[str, Any]) -> None:
        histories = histories_of(jobs)
        published = self._reentry.results.listed(experiment.name)
        if any(one.files and one.is_another_in_the_folder_of(experiment) for one in published):
            why = "it contains another machine's results with different settings; this machine's results stay in"
            self._reentry.damaged(experiment.results_dir, f"{why} {self._project.live_dir}")
            return
        listed = {(one.kind, one.fold, one.chain) for one in published}
        folder = self._project.working_results(experiment.results_dir)
        for job in jobs:
            if job.state is not State.COMMITTED or job.kind is Kind.TRAIN or job.result is None:
                continue
            chain = chain_of(job, histories)
            found = [] if job.kind is Kind.PREPARE else result_files(folder, job, experiment.spec)
            if found is None:
                continue  # the session will notice that files are missing, and recreate them
            if (job.kind, job.fold, chain) in listed and self._reentry.results.are_whole(experiment.results_dir, found):
                continue
            outcome = ResultListing(
                kind=job.kind.value,
                experiment=experiment.name,
                spec_hash=experiment.spec_hash,
                fold=job.fold,
                chain=chain,
                result=job.result,
                files=found,
                enqueued=enqueued,
            )
            with self._writing(total_bytes(found)):
                self._reentry.results.publish(outcome, folder)

    @contextmanager
    def _writing(self, size: int) -> Iterator[None]:
        """Measure how long the ``with`` block takes to write ``size`` bytes.

        Raises:
            NoTime: before the block runs, if the session has too little time to write ``size`` bytes.
        """
        self._write_time.require(size, self._remaining())
        began = self._clock.monotonic()
        yield
        self._wrote = True
        self._write_time.learn(size, self._clock.monotonic() - began)

    def _trouble(self, why: str) -> None:
        self._steady_since = self._clock.monotonic()
        try:
            with LiveState.changing(self._project.publishing_file) as state:
                first = state.trouble is None
                since = self._clock.now() if state.trouble is None else state.trouble["since"]
                state.trouble = {"why": why, "since": since}
        except OSError as error:
            self._note(f"{self._project.publishing_file} cannot be written: {error}")
            return
        if first:
            self._note(f"DEGRADED: {why}. Training continues, and mbqueue publishes the work when the mount is back.")


def _last_event(queue: Queue) -> int:
    return max((event.id for event in queue.events(limit=1)), default=0)

"""The state of a running session: its queue, its current job, and when to stop."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mbqueue.clock import Clock
from mbqueue.drive.publishing import Publisher
from mbqueue.errors import LeaseLost, QueueError, SpecError, StoreAway, StoreError
from mbqueue.experiment import Spec, hash_of_spec, parse_spec
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import Experiment, Job, Lease, State
from mbqueue.queue.store import Queue
from mbqueue.session.heartbeat import Heartbeat
from mbqueue.session.outcome import TIME_IS_UP
from mbqueue.session.pace import Pace
from mbqueue.session.report import Report
from mbqueue.session.stop import Deadline, StopRequest
from mbqueue.session.storewatch import StoreWatch
from mbqueue.storage.objects import ObjectStore
from mbqueue.train.fold import FoldRun

#: A job starts only if at least this much time is left.
SHORTEST_JOB_SECONDS = 5.0
#: The recorded reason when a session cannot save its work and therefore releases the job.
STORE_AWAY = "the object store is not responding"


class Stopped(Exception):
    """Raised to stop a job early; the message gives the reason."""


class Rewound(Exception):
    """Checkpoints are damaged; the message names the epochs that will be trained again."""


@dataclass(kw_only=True)
class Session:
    """One session: its queue, its current job, its deadline, and the report that receives its events.

    Attributes:
        max_jobs: number of jobs after which the session stops; None for no limit.
        has_saved: whether the session saved any part of a job.
    """

    id: str
    project: ProjectFolder
    queue: Queue
    clock: Clock
    stop: StopRequest
    deadline: Deadline
    heartbeat: Heartbeat
    report: Report
    publisher: Publisher | None = None
    store: ObjectStore | None = None
    watch: StoreWatch | None = None
    max_jobs: int | None = None
    jobs_done: int = field(default=0, init=False)
    has_saved: bool = field(default=False, init=False)
    _next_lease: Lease | None = field(default=None, init=False)
    _given_back: set[tuple[int, str]] = field(default_factory=set, init=False)
    _noted: set[str] = field(default_factory=set, init=False)

    def stop_reason(self, seconds_needed: float = 0.0) -> str | None:
        """Why the current job should not start work that takes ``seconds_needed``; None if the work may start.

        If the time left is too short, the whole session stops, because a later job would have even less time.
        """
        if self.heartbeat.withdrawn:
            return self.heartbeat.withdrawn
        if not self.deadline.allows(seconds_needed):
            self.stop.request(TIME_IS_UP)
        return self.stop.reason

    def should_stop(self) -> bool:
        return self.stop_reason() is not None

    def stopped(self) -> Stopped:
        """The exception that ends a job early, with the reason for stopping."""
        return Stopped(self.stop_reason() or "asked to stop")

    @property
    def jobs_left(self) -> float:
        """How many more jobs the session may run, including the current job; infinity without a limit."""
        return math.inf if self.max_jobs is None else self.max_jobs - self.jobs_done

    def may_go_on(self) -> bool:
        """Whether the session would claim another job now."""
        return not (
            self.stop
            or not self.deadline.allows(SHORTEST_JOB_SECONDS)
            or self.jobs_left <= 1  # the current job
            # Do not claim a job yet if this session may first have to adopt other sessions' commits or wait for the
            # store.
            or (self.publisher is not None and self.publisher.others)
            or (self.watch is not None and self.watch.why is not None)
        )

    def take_next(self) -> Lease | None:
        """Return the lease that was claimed with the last commit, but only once; after that, return None."""
        lease, self._next_lease = self._next_lease, None
        return lease

    def commit(
        self,
        lease: Lease,
        *,
        result: Mapping[str, Any],
        publish: Callable[[], None] | None = None,
        skip_rest: str | None = None,
        prunes: bool = False,
    ) -> None:
        """Commit the job and, if the session continues, claim the next job in the same transaction.

        Args:
            skip_rest: the reason to skip the fold's later epochs; None to keep them.
            prunes: whether ``skip_rest`` prunes the whole trial.

        Raises:
            LeaseLost, QueueError: for the same reasons as in `Leases.commit`.
        """
        now = self.clock.now()
        result = {"seconds": self.heartbeat.seconds, **result}
        if not self.may_go_on():
            self.queue.commit(lease, result=result, now=now, publish=publish, skip_rest=skip_rest, prunes=prunes)
            return
        try:
            self._next_lease = self.queue.commit_and_claim(
                lease,
                result=result,
                now=now,
                lease_seconds=self.project.settings.lease_seconds,
                publish=publish,
                skip_rest=skip_rest,
                prunes=prunes,
                reap=self.heartbeat.may_reap(),
            )
        except LeaseLost:
            raise
        except QueueError:
            # A failing disk may have written the commit anyway. Find the lease that was claimed in the same
            # transaction, because its job would stay blocked until the lease expires.
            with suppress(QueueError):
                self._next_lease = self._held_beside(lease)
            raise

    def while_held(self, lease: Lease, action: Callable[[], None]) -> None:
        """Call ``action`` to change a job's files, if this session still holds the job's lease.

        Raises:
            LeaseLost: if the lease is lost; ``action`` is not called, because the files may belong to the job's next
                holder.
        """
        seconds = self.project.settings.lease_seconds
        self.queue.renew(lease, now=self.clock.now(), lease_seconds=seconds, publish=action)

    def _held_beside(self, lease: Lease) -> Lease | None:
        held = (job for job in self.queue.jobs(state=State.LEASED) if job.session == self.id)
        return next((Lease(job=job, session=self.id) for job in held if job.id != lease.job.id), None)

    def give_back_next(self, reason: str, *, for_others: bool = False) -> None:
        """Release the job that was claimed with the last commit, if it has not started."""
        lease = self.take_next()
        if lease is not None:
            with suppress(QueueError):  # the lease is already lost, or will expire
                self.queue.release(lease, reason=reason, now=self.clock.now(), for_others=for_others)

    def give_back(self, lease: Lease, reason: str, *, for_others: bool = False) -> None:
        """Release a job that has started; do nothing if its lease is lost."""
        with suppress(QueueError):  # after any error, the lease is already lost or expires by itself
            self.queue.release(lease, reason=reason, now=self.clock.now(), preempted=True, for_others=for_others)

    def give_back_once(self, lease: Lease, error: Exception, reason: str) -> None:
        """Release a job; if it was already released for the same reason, count a failed attempt.

        If no failed attempt were counted, sessions could claim and release the same job forever.
        """
        if (lease.job.id, reason) in self._given_back:
            self.fail(lease, error)
        else:
            self._given_back.add((lease.job.id, reason))
            self.give_back(lease, reason)

    def fail(self, lease: Lease, error: Exception, *, final: bool = False) -> None:
        text = "".join(traceback.format_exception(error))
        try:
            job = self.queue.fail(lease, error=text, now=self.clock.now(), final=final)
        except LeaseLost as lost:
            self.report.note(str(lost))
            return
        self.report.job_failed(lease.job, error, None if job.state is State.FAILED else job.not_before)

    def job_done(self, job: Job, summary: str) -> None:
        self.jobs_done += 1
        self.report.job_finished(job, summary)

    def saved(self, seconds: float) -> None:
        """Record that publishing a staged commit took ``seconds``."""
        self.has_saved = True
        self.deadline.saw_save(seconds + (self.store.put_seconds if self.store is not None else 0.0))
        if self.publisher is not None:
            self.publisher.wake()

    def hold_on(self, error: StoreError) -> None:
        """Wait before trying the object store again; the session keeps its lease in the meantime.

        Raises:
            StoreError: if the session must stop, or has waited for too long.
            Stopped: if the session must give up the job.
        """
        assert self.watch is not None
        pause = self.watch.pause(error)
        if self.watch.is_first_try:
            # The queue's server may be unreachable too; `watch` has already reported the outage.
            with suppress(QueueError):
                self.queue.note(f"DEGRADED: {error}", by=self.id, now=self.clock.now())
        if self.stop_reason(pause) is None:
            self.stop.wait(pause)
        if self.heartbeat.withdrawn:
            raise self.stopped()
        if self.stop.reason is not None:
            raise error

    def await_store(self) -> bool:
        """Wait until the object store answers; return False if a stop is requested first.

        Raises:
            StoreError: if the session has waited for too long.
        """
        while self.watch is not None and self.watch.why is not None:
            assert self.store is not None
            self.give_back_next(STORE_AWAY, for_others=True)
            pause = self.watch.pause(StoreAway(self.watch.why))
            if not self.deadline.allows(pause):
                self.stop.request(TIME_IS_UP)
            if self.stop.wait(pause):
                return False
            with suppress(StoreError):
                self.store.ping()
        return True

    def experiment_of(self, job: Job) -> tuple[Experiment, Spec]:
        """A job's experiment and its spec.

        Raises:
            SpecError: if the spec differs from the enqueued spec.
        """
        experiment = self.queue.experiment_of(job.experiment_id)
        if hash_of_spec(experiment.spec) != experiment.spec_hash:
            # SQLite has no checksums, so a flipped bit could change a learning rate unnoticed.
            raise SpecError(
                f"The spec of {experiment.name} in {self.queue.database.name} is damaged: it differs from the enqueued "
                "spec. Rebuild the queue from the checkpoints: mbqueue recover --force"
            )
        spec = parse_spec(
            experiment.spec,
            source=f"the spec of {experiment.name} in the queue",
            advice="Another version of mbqueue enqueued this experiment. Use that version, then run mbqueue retry. "
            "Or enqueue the experiment under a new name (--name).",
        )
        return experiment, spec

    def progress_of(self, job: Job, what: str) -> Callable[[int, int], None]:
        """Return a callback (done, total) that reports the progress of ``what`` to the user and to the queue."""
        pace = Pace(self.clock)

        def advanced(done: int, total: int) -> None:
            pace.reached(done)
            progress: dict[str, Any] = {"what": what, "done": done, "total": total}
            if pace.per_second:
                progress["seconds_left"] = (total - done) / pace.per_second
            self.heartbeat.show(progress)
            self.report.advanced(job, what, done, total, {"per second": pace.per_second} if pace.per_second else {})

        return advanced

    def stoppable_progress_of(self, job: Job, what: str) -> Callable[[int, int], None]:
        """Like `progress_of`, but the callback raises `Stopped` if the current job should stop."""
        advanced = self.progress_of(job, what)

        def advanced_or_stopped(done: int, total: int) -> None:
            advanced(done, total)
            if self.should_stop():
                raise self.stopped()

        return advanced_or_stopped

    def note_once(self, text: str) -> None:
        """Report a message only once per session, for example a note about the device that applies to every fold."""
        if text not in self._noted:
            self._noted.add(text)
            self.report.note(text)

    def require_epochs(self, lease: Lease, experiment: Experiment, fold: FoldRun, epochs: int) -> None:
        """Check that the fold's first ``epochs`` epochs have intact commits; otherwise queue the lost epochs again.

        Raises:
            Rewound: if epochs were queued again; the session no longer holds the lease.
        """
        reached = fold.finished_epochs()
        if reached >= epochs:
            return
        why = f"checkpoints of fold {fold.fold} are damaged or missing; the last intact epoch is {reached}"
        self.queue.rewind(experiment.name, {fold.fold: why}, to_epoch=reached, now=self.clock.now(), lease=lease)
        raise Rewound(f"{why}. Later epochs are queued again.")

    def damaged(self, lease: Lease, text: str) -> None:
        self.report.note(text)
        self.note_on(lease.job, text)

    def note_on(self, job: Job, text: str) -> None:
        self.queue.note(text, by=self.id, now=self.clock.now(), experiment_id=job.experiment_id, job_id=job.id)

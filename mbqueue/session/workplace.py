"""What a job needs while it is done: the queue, the device, the data that is loaded, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from mbqueue.clock import Clock
from mbqueue.data.cache_lock import building
from mbqueue.drive.outcomes import enqueued_facts
from mbqueue.drive.published import PublishedFold
from mbqueue.drive.publishing import Publisher
from mbqueue.errors import LeaseLost, QueueError, SpecError, StoreAway, StoreError
from mbqueue.experiment import Spec, hash_of_spec, parse_spec
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import LOADED_NOTE, Experiment, Job, Kind, Lease, State
from mbqueue.queue.store import Queue
from mbqueue.session.compiling import Compiling
from mbqueue.session.heartbeat import Heartbeat
from mbqueue.session.loading import LoadedData, load_data
from mbqueue.session.outcome import TIME_IS_UP
from mbqueue.session.pace import Pace
from mbqueue.session.report import Report
from mbqueue.session.shelving import Shelving
from mbqueue.session.stop import Deadline, StopRequest
from mbqueue.session.storewatch import StoreWatch
from mbqueue.storage.manifest import Identity
from mbqueue.storage.mounted import Drive
from mbqueue.storage.objects import ObjectStore
from mbqueue.storage.places import Place, in_folder, in_store
from mbqueue.train.backbone import is_prepared, kinds_needed, open_frozen, prepare_frozen
from mbqueue.train.checkpoint import Checkpoints
from mbqueue.train.fold import FoldRun
from mbqueue.train.frozen import FrozenBackbone
from mbqueue.train.shared_frozen import fetch_shards, send_shards

#: No job is begun that has less time than this.
SHORTEST_JOB_SECONDS = 5.0
#: Why a job is given back that cannot be saved.
STORE_AWAY = "the object store does not answer"


class Stopped(Exception):
    """The job was asked to stop before its end; the message says why."""


class Rewound(Exception):
    """Checkpoints are damaged; the message says which epochs are done again."""


@dataclass(kw_only=True)
class Workplace:
    """One session's means.

    Data and fold of the last job are kept, so that the next epoch finds the model on the device.

    Attributes:
        jobs_done: jobs that the session committed.
        has_saved: whether a part of a job is kept.
    """

    project: ProjectFolder
    queue: Queue
    session: str
    device: torch.device
    clock: Clock
    stop: StopRequest
    deadline: Deadline
    heartbeat: Heartbeat
    report: Report
    shelving: Shelving
    compiling: Compiling
    publisher: Publisher | None = None
    store: ObjectStore | None = None
    watch: StoreWatch | None = None
    jobs_left: int | None = None
    next_lease: Lease | None = field(default=None, init=False)
    jobs_done: int = field(default=0, init=False)
    has_saved: bool = field(default=False, init=False)
    given_back: set[tuple[int, str]] = field(default_factory=set, init=False)
    _data: LoadedData | None = field(default=None, init=False)
    _fold: tuple[tuple[int, int], FoldRun] | None = field(default=None, init=False)
    _noted: set[str] = field(default_factory=set, init=False)

    # -- stopping ------------------------------------------------------------------------------------------------

    def stop_reason(self, seconds_needed: float = 0.0) -> str | None:
        """Why the current job should stop now, or None; ``seconds_needed`` is what its next part takes.

        Once there is no time for a next part the whole session stops: a job that is begun later would not have it.
        """
        if self.heartbeat.withdrawn:
            return self.heartbeat.withdrawn
        if not self.deadline.allows(seconds_needed):
            self.stop.request(TIME_IS_UP)
        return self.stop.reason

    def should_stop(self) -> bool:
        """Whether there is a reason to stop."""
        return self.stop_reason() is not None

    def stopped(self) -> Stopped:
        """The exception for a part of a job that said it was stopped."""
        return Stopped(self.stop_reason() or "asked to stop")

    def may_go_on(self) -> bool:
        """Whether the session would claim another job now."""
        return not (
            self.stop
            or not self.deadline.allows(SHORTEST_JOB_SECONDS)
            or (self.jobs_left is not None and self.jobs_left <= 1)
            # What others have published, or a store that is away, is looked after between two jobs.
            or (self.publisher is not None and self.publisher.others)
            or (self.watch is not None and self.watch.why is not None)
        )

    def commit(
        self,
        lease: Lease,
        *,
        result: Mapping[str, Any],
        publish: Callable[[], None] | None = None,
        skip_rest: str | None = None,
        prunes: bool = False,
    ) -> None:
        """Commit the job (as `Leases.skip_rest` where a reason for that is given), and claim the next with it.

        Raises:
            LeaseLost, QueueError: as `Leases.commit`.
        """
        now = self.clock.now()
        result = {"seconds": self.heartbeat.seconds, **result}
        if not self.may_go_on():
            if skip_rest is not None:
                self.queue.skip_rest(lease, result=result, why=skip_rest, now=now, publish=publish, prunes=prunes)
            else:
                self.queue.commit(lease, result=result, now=now, publish=publish)
            return
        try:
            self.next_lease = self.queue.commit_and_claim(
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
            # A disk that failed may have written all the same; what was claimed with it is not to wait for its end.
            with suppress(QueueError):
                self.next_lease = self._held_beside(lease)
            raise

    def while_held(self, lease: Lease, action: Callable[[], None]) -> None:
        """Do what only the holder of the lease may do to files, like removing what those before it left.

        Raises:
            LeaseLost: when the lease is lost; then nothing was done. What is there may be the next holder's.
        """
        seconds = self.project.settings.lease_seconds
        self.queue.renew(lease, now=self.clock.now(), lease_seconds=seconds, publish=action)

    def _held_beside(self, lease: Lease) -> Lease | None:
        held = (job for job in self.queue.jobs(state=State.LEASED) if job.session == self.session)
        for job in held:
            if job.id != lease.job.id and job.lease_expires_at is not None:
                return Lease(job=job, session=self.session, fence=job.fence, expires_at=job.lease_expires_at)
        return None

    def give_back_next(self, reason: str, *, for_others: bool = False) -> None:
        """Give back a job that was claimed with the last commit and not begun."""
        lease, self.next_lease = self.next_lease, None
        if lease is not None:
            with suppress(QueueError):  # it is lost already, or runs out
                self.queue.release(lease, reason=reason, now=self.clock.now(), for_others=for_others)

    def saved(self, seconds: float) -> None:
        """Something was committed, which took ``seconds`` after it was staged."""
        self.has_saved = True
        self.deadline.saw_save(seconds + (self.store.put_seconds if self.store is not None else 0.0))
        if self.publisher is not None:
            self.publisher.wake()

    def hold_on(self, error: StoreError) -> None:
        """Wait a while after the object store did not answer; the lease is kept meanwhile.

        Raises:
            StoreError: when the session is to stop, or it was waited for long enough.
            Stopped: when the job is to be given up.
        """
        assert self.watch is not None
        pause = self.watch.pause(error)
        if self.watch.is_first_try:
            with suppress(QueueError):  # one that is on the same lost network is told by the store's own note
                self.queue.note(f"DEGRADED: {error}", by=self.session, now=self.clock.now())
        if self.stop_reason(pause) is None:
            self.stop.wait(pause)
        if self.heartbeat.withdrawn:
            raise self.stopped()
        if self.stop.reason is not None:
            raise error

    def await_store(self) -> bool:
        """Wait until the object store answers, so that no job is begun that cannot be saved; False when asked to stop.

        Raises:
            StoreError: when it was waited for long enough.
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

    # -- what a job works on ---------------------------------------------------------------------------------------

    def experiment_of(self, job: Job) -> tuple[Experiment, Spec]:
        """A job's experiment and its spec.

        Raises:
            SpecError: when it is not the spec that was enqueued.
        """
        experiment = self.queue.experiment_of(job.experiment_id)
        if hash_of_spec(experiment.spec) != experiment.spec_hash:
            # SQLite keeps no checksums: a flipped bit in a learning rate would be trained with.
            raise SpecError(
                f"The spec of {experiment.name} in {self.queue.database.name} is not the one that was enqueued: it "
                "is damaged. Rebuild the queue from the checkpoints: mbqueue recover --force"
            )
        return experiment, parse_spec(experiment.spec, source=f"the spec of {experiment.name} in the queue")

    def progress_of(self, job: Job, what: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows ``what`` to the watcher and, by the heartbeat, to the queue."""
        pace = Pace(self.clock)

        def advanced(done: int, total: int) -> None:
            pace.reached(done)
            progress: dict[str, Any] = {"what": what, "done": done, "total": total}
            if pace.per_second:
                progress["seconds_left"] = (total - done) / pace.per_second
            self.heartbeat.show(progress)
            self.report.advanced(job, what, done, total, {"per second": pace.per_second} if pace.per_second else {})

        return advanced

    def _stoppable_progress_of(self, job: Job, what: str) -> Callable[[int, int], None]:
        """The same, for what cannot be asked to stop otherwise: reading and downloading go on where they broke off."""
        advanced = self.progress_of(job, what)

        def advanced_or_stopped(done: int, total: int) -> None:
            advanced(done, total)
            if self.should_stop():
                raise self.stopped()

        return advanced_or_stopped

    def data_for(self, job: Job, experiment: Experiment, spec: Spec) -> LoadedData:
        """The experiment's crystals and graphs; kept for the next job.

        Raises:
            Stopped: when asked to stop while they are read or converted.
        """
        # Crystals drawn with a limit depend on the seed too; what was prepared tells them apart by its hash.
        data = self._data
        if data is None or data.wanted != spec.data or data.crystals.hash != experiment.dataset_hash:
            self._fold, self._data = None, None
            data = load_data(
                self.project,
                spec.data,
                seed=spec.seed,
                target=spec.predicts,
                dataset_hash=experiment.dataset_hash,
                progress=lambda what: self._stoppable_progress_of(job, what),
                should_stop=self.should_stop,
                note=self.report.note,
                store=self.store,
                keep=self.shelving.keep,
            )
            if data is None:
                raise self.stopped()
            self._data = data
        return data

    def frozen_for(self, job: Job, spec: Spec, data: LoadedData) -> FrozenBackbone:
        """What the pretrained backbone gives for the crystals, complete; computed where it is missing.

        Raises:
            Stopped: shards that are finished stay.
        """
        frozen = open_frozen(spec, data.crystals, self.project.cache_dir)
        with building(frozen.folder):
            self._complete(frozen, job, spec, data)
        return frozen

    def _complete(self, frozen: FrozenBackbone, job: Job, spec: Spec, data: LoadedData) -> None:
        advanced = self.progress_of(job, "pretrained energies")
        if self.store is not None:  # also what is here already, if it is not what all others use
            fetch_shards(
                self.store,
                frozen,
                kinds_needed(spec),
                should_stop=self.should_stop,
                on_progress=lambda progress: advanced(progress.done, progress.total),
            )
        if not is_prepared(spec, frozen):
            finished = prepare_frozen(
                spec,
                data.graphs,
                frozen,
                device=self.device,
                should_stop=self.should_stop,
                on_progress=lambda progress: advanced(progress.done, progress.total),
                on_note=self.note_once,
            )
            if not finished:
                raise self.stopped()
        store = self.store if job.kind is Kind.PREPARE else None
        if store is not None and not send_shards(store, frozen, kinds_needed(spec), should_stop=self.should_stop):
            raise self.stopped()

    def place_of(self, identity: Identity) -> Place:
        """Where the commits of a fold are."""
        if self.store is not None:
            return in_store(self.store, identity)
        return in_folder(self.project.checkpoints_dir(identity.experiment, identity.fold))

    def _checkpoints(self, lease: Lease, experiment: Experiment, fold: int) -> Checkpoints:
        identity = experiment.identity(fold)
        folder = self.project.checkpoints_dir(experiment.name, fold)
        return Checkpoints(
            self.place_of(identity),
            identity,
            lambda stem, why: self.damaged(lease, f"{stem} was set aside: {why}"),
            near=None if self.store is None else folder,
            mirror=None if self.publisher is None else PublishedFold(Drive(self.project.root), identity),
            note=self.report.note,
            enqueued=enqueued_facts(experiment, self._prepared(experiment)),
            hold_on=self.hold_on,
        )

    @property
    def loaded_fold(self) -> tuple[int, int] | None:
        """(experiment id, fold) whose model is on the device."""
        return self._fold[0] if self._fold else None

    def forget_fold(self) -> None:
        """Drop the loaded fold, so that the next job reads it anew."""
        self._fold = None

    def fold_run(self, lease: Lease, experiment: Experiment, spec: Spec) -> FoldRun:
        """The lease's fold, ready to train or predict; kept for the next job."""
        job = lease.job
        assert job.fold is not None
        key = (experiment.id, job.fold)
        if self._fold is None or self._fold[0] != key:
            self._fold = None
            data = self.data_for(job, experiment, spec)
            checkpoints = self._checkpoints(lease, experiment, job.fold)
            self.while_held(lease, checkpoints.sweep)
            frozen = self.frozen_for(job, spec, data)
            self.compiling.wait()
            self._fold = (
                key,
                FoldRun(
                    spec=spec,
                    fold=job.fold,
                    crystals=data.crystals,
                    cache=data.graphs,
                    frozen=frozen,
                    checkpoints=checkpoints,
                    device=self.device,
                    memory_file=self.project.device_limits,
                    fingerprint_extra={**data.fingerprint, "frozen": frozen.digest(kinds_needed(spec))},
                    on_note=self.note_once,
                    clock=self.clock,
                ),
            )
            self.queue.note(
                LOADED_NOTE, by=self.session, now=self.clock.now(), experiment_id=experiment.id, job_id=job.id
            )
        return self._fold[1]

    def note_once(self, text: str) -> None:
        """Tell a person something, unless this session has said the very same before: of a device, each fold would."""
        if text not in self._noted:
            self._noted.add(text)
            self.report.note(text)

    def _prepared(self, experiment: Experiment) -> dict[str, Any] | None:
        jobs = self.queue.jobs(experiment=experiment.name, state=State.COMMITTED)
        return next((job.result for job in jobs if job.kind is Kind.PREPARE), None)

    def require_epochs(self, lease: Lease, experiment: Experiment, fold: FoldRun, epochs: int) -> None:
        """Go on when so many epochs of the fold have whole commits; else queue those that are lost again.

        Raises:
            Rewound: the lease is given up.
        """
        reached = fold.finished_epochs()
        if reached >= epochs:
            return
        why = f"checkpoints of fold {fold.fold} are damaged or gone; the newest whole one ends with epoch {reached}"
        self.queue.rewind(experiment.name, {fold.fold: why}, to_epoch=reached, now=self.clock.now(), lease=lease)
        raise Rewound(f"{why}. The epochs after it are queued again.")

    def damaged(self, lease: Lease, text: str) -> None:
        """Say what was found damaged, and what is done about it; also among the events of the job."""
        self.report.note(text)
        job = lease.job
        self.queue.note(text, by=self.session, now=self.clock.now(), experiment_id=job.experiment_id, job_id=job.id)

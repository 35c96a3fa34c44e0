"""Run one session: claim, run and commit jobs until no job is left, the time is up or a stop is requested."""

from __future__ import annotations

import errno
from contextlib import nullcontext, suppress

import torch

from mbqueue import files
from mbqueue.clock import Clock, SystemClock, format_duration
from mbqueue.data.machine_code import telling
from mbqueue.drive.publishing import Publisher
from mbqueue.errors import (
    CacheError,
    CheckpointMisfit,
    CommitTaken,
    DataError,
    DeviceLost,
    DiskFull,
    LeaseLost,
    MbqueueError,
    MembersNotRecorded,
    QueueDiskFull,
    QueueError,
    ResultsError,
    RewoundBefore,
    SourceAway,
    SpecError,
    StoreAway,
    StoreError,
    TrainingError,
    causes,
    counted,
)
from mbqueue.limits import why_limited
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import Kind, Lease
from mbqueue.queue.obstacles import obstacles
from mbqueue.queue.opening import open_queue, require_queue
from mbqueue.queue.overview import Outlook
from mbqueue.queue.store import Queue
from mbqueue.session import predict, prepare, record, train
from mbqueue.session.commits_binding import enter_place, require_same
from mbqueue.session.compiling import Compiling
from mbqueue.session.crystal_copies import CrystalCopies
from mbqueue.session.device_check import tested_device, why_full, why_lost
from mbqueue.session.ending import end_command_after
from mbqueue.session.heartbeat import Heartbeat
from mbqueue.session.options import WorkOptions
from mbqueue.session.originals import require_original
from mbqueue.session.outcome import TIME_IS_UP, Ending, SessionOutcome, StopCause, StopKind
from mbqueue.session.report import Report
from mbqueue.session.searching import Searching
from mbqueue.session.session import SHORTEST_JOB_SECONDS, STORE_AWAY, Rewound, Session, Stopped
from mbqueue.session.stop import Deadline, StopRequest
from mbqueue.session.storewatch import StoreWatch
from mbqueue.session.working_set import WorkingSet
from mbqueue.storage.objects import store_of
from mbqueue.train.arithmetic import device_name

_HANDLERS = {Kind.PREPARE: prepare.run, Kind.TRAIN: train.run, Kind.PREDICT: predict.run, Kind.RECORD: record.run}

#: How long a session waits before it looks for a job again.
POLL_SECONDS = 2.0
#: How long a job waits if it needs results of other experiments that have not been recorded yet.
MEMBERS_SECONDS = 60.0
#: How long publishing may continue after a signal.
PUBLISH_AFTER_SIGNAL_SECONDS = 20.0


def work(
    project: ProjectFolder,
    options: WorkOptions,
    *,
    report: Report,
    stop: StopRequest | None = None,
    clock: Clock | None = None,
) -> SessionOutcome:
    """Run one session, which waits whenever the queue's server is not responding, even at the start.

    Raises:
        UsageError: if the device does not exist, or nothing has been enqueued yet.
        QueueError: if the queue cannot be read or written.
        StoreError: if the project's commits are not at the location that the queue records, or if the store cannot be
            used.
        DeviceLost: if the GPU stopped working before anything was saved; after a save, the session ends without an
            error.
        DeviceBusy: if other processes are using so much of the GPU's memory that nothing can be computed.
    """
    clock = SystemClock() if clock is None else clock
    # Do not use `stop or StopRequest()`, because a `StopRequest` is false until a stop is requested.
    stop = StopRequest() if stop is None else stop
    require_queue(project, wait=stop.wait)
    project.topology.require_shared()
    require_original(project)
    device = tested_device(options.device)
    with end_command_after(project.settings, note=report.note) if options.end_command else nullcontext():
        return _run(project, options, device, report=report, stop=stop, clock=clock)


def _run(
    project: ProjectFolder,
    options: WorkOptions,
    device: torch.device,
    *,
    report: Report,
    stop: StopRequest,
    clock: Clock,
) -> SessionOutcome:
    """Run the session without its end command."""
    with open_queue(
        project, wait=stop.wait, refuses=lambda lost: lost.is_overwritten_by_work, note=report.note
    ) as queue:
        queue.verify()
        session = _begin(project, queue, options, device, report=report, stop=stop, clock=clock)
        crystal_copies = CrystalCopies(
            project, should_stop=lambda: stop.cause is not None, spare=session.deadline.spare, note=report.note
        )
        working_set = WorkingSet(
            session, device, compiling=Compiling(device, report.note), crystal_copies=crystal_copies
        )
        with session.publisher or nullcontext(), crystal_copies:  # publishes the remaining work on exit
            ending, cause, lost = _work_and_end(session, working_set, options)
    if lost is not None:
        # Raise an error if nothing was saved, so that no script or cluster keeps starting sessions in vain.
        if not (session.jobs_done or session.has_saved):
            raise lost
        report.note(str(lost))
    return SessionOutcome(session=session.id, ending=ending, cause=cause, jobs_done=session.jobs_done)


def _begin(
    project: ProjectFolder,
    queue: Queue,
    options: WorkOptions,
    device: torch.device,
    *,
    report: Report,
    stop: StopRequest,
    clock: Clock,
) -> Session:
    """Check where the commits are, and record the start of the session in the queue and in the report."""
    settings = project.settings
    # A process that starts several sessions runs the end command once they have all ended. Each session reserves time
    # for the end command.
    deadline = Deadline(
        clock,
        options.session_seconds,
        end_command_seconds=settings.end_command_seconds if settings.end_command else 0.0,
    )
    # Remove temp files of dead processes now; otherwise they would stay until the same note is written again.
    with suppress(OSError):
        files.sweep(project.notes_dir)
    watch = StoreWatch(project, clock=clock, note=report.note)
    store = store_of(project.topology, watch)
    commits_place = enter_place(project, queue, store, note=report.note, clock=clock)
    session_id = queue.start_session(
        device=device_name(device), now=clock.now(), alive_seconds=settings.lease_seconds, deadline_at=deadline.at
    )
    try:
        require_same(queue, commits_place)
    except QueueError as error:
        queue.end_session(session_id, reason=str(error), now=clock.now())
        raise
    report.session_started(session_id, device_name(device), options.session_seconds)
    if project.topology.why_not_safe is not None:
        report.note(project.topology.why_not_safe)
    return Session(
        id=session_id,
        project=project,
        queue=queue,
        clock=clock,
        stop=stop,
        deadline=deadline,
        heartbeat=Heartbeat(
            queue, session_id, lease_seconds=settings.lease_seconds, clock=clock, on_trouble=report.note
        ),
        report=report,
        publisher=_publisher(project, session_id, clock, report, deadline, stop),
        store=store,
        watch=None if store is None else watch,
        max_jobs=options.max_jobs,
    )


def _work_and_end(
    session: Session, working_set: WorkingSet, options: WorkOptions
) -> tuple[Ending, StopCause, DeviceLost | None]:
    """Run jobs until the session ends, and record why it ended; also return the error if the GPU is lost."""
    queue, clock = session.queue, session.clock
    try:
        with telling(session.report.note), session.heartbeat:
            ending, cause = _loop(session, working_set, options)
    except DeviceLost as error:
        # The queue treats the loss of a GPU as if the session's process had died.
        cause = StopCause.by_lost_device(error.why)
        with suppress(QueueError):
            queue.end_session(session.id, reason=cause.reason, now=clock.now(), lost=True)
        return Ending.STOPPED, cause, error
    except BaseException as error:
        with suppress(QueueError):  # on a full disk, this write fails, and the lease expires by itself
            queue.end_session(session.id, reason=f"{type(error).__name__}: {error}", now=clock.now())
        raise
    queue.end_session(session.id, reason=cause.reason, now=clock.now())
    return ending, cause, None


def _publisher(
    project: ProjectFolder, session: str, clock: Clock, report: Report, deadline: Deadline, stop: StopRequest
) -> Publisher | None:
    if not project.topology.is_mirrored:
        return None

    def remaining() -> float:
        # After a signal there is no time to wait for a slow mount.
        by_signal = stop.cause is not None and stop.cause.kind is StopKind.SIGNAL
        return min(deadline.remaining(), PUBLISH_AFTER_SIGNAL_SECONDS) if by_signal else deadline.remaining()

    return Publisher(
        project,
        session,
        clock=clock,
        note=report.note,
        remaining=remaining,
        should_stop=lambda: stop.cause is not None,
        on_published=deadline.saw_publish,
    )


def _meet_others(session: Session, working_set: WorkingSet) -> None:
    """Adopt the commits that sessions with other databases have published since the last check."""
    if session.publisher is None or not session.publisher.others:
        return
    session.give_back_next("adopting the commits of other sessions")
    taken = session.publisher.reconcile(session.queue, now=session.clock.monotonic(), spare=session.deadline.spare())
    if working_set.fold_key in taken:
        working_set.forget_fold()


def _loop(session: Session, working_set: WorkingSet, options: WorkOptions) -> tuple[Ending, StopCause]:
    queue, stop, clock, searching = session.queue, session.stop, session.clock, Searching(session)
    idle_since: float | None = None
    is_hinted = False
    while True:
        if not session.deadline.allows(SHORTEST_JOB_SECONDS):
            stop.request(TIME_IS_UP)
        if stop.cause is not None:
            session.give_back_next(stop.cause.reason)
            return Ending.STOPPED, stop.cause
        if session.jobs_left <= 0:
            left = not queue.outlook(now=clock.now()).is_exhausted
            done = StopCause(StopKind.LIMIT, f"reached the limit of {counted(session.jobs_done, 'job')}")
            return (Ending.STOPPED if left else _idle_ending(session, searching)[0]), done
        if not session.await_store():
            continue  # a stop was requested in the meantime
        queue.reap_dead(by=session.id, now=clock.now())
        _meet_others(session, working_set)
        lease = _claim(session, working_set, searching)
        if lease is not None:
            _do(session, working_set, lease)
            idle_since = None
            continue
        outlook = queue.outlook(now=clock.now())
        idle_since = clock.monotonic() if idle_since is None else idle_since
        active = session.publisher.active_others if session.publisher is not None else []
        is_exhausted = outlook.is_exhausted and not searching.is_left_to_others
        if active and not (options.forever or outlook.leased or outlook.delayed or is_exhausted):
            names = ", ".join(other.session.id for other in active)
            why = f"other sessions run the remaining jobs: {names}"
            return Ending.STOPPED, StopCause(StopKind.OTHERS, why)
        if is_exhausted and not options.forever:
            ending, reason = _idle_ending(session, searching)
            return ending, StopCause(StopKind.EXHAUSTED, reason)
        if options.idle_seconds is not None and clock.monotonic() - idle_since >= options.idle_seconds:
            idle = format_duration(options.idle_seconds)
            why = f"no job to claim for {idle}; other sessions hold {counted(outlook.leased, 'job')}"
            return Ending.STOPPED, StopCause(StopKind.IDLE, why)
        is_hinted = _report_waiting(session, outlook, is_hinted=is_hinted)
        queue.database.wait(POLL_SECONDS, stop.wait)


def _report_waiting(session: Session, outlook: Outlook, *, is_hinted: bool) -> bool:
    """Report what the session is waiting for.

    Return whether the user has seen a note that explains how to retry immediately.
    """
    if outlook.is_exhausted:
        session.report.waiting("nothing is left to do; waiting for new jobs")
    elif outlook.next_retry is not None and not outlook.leased:
        first, left = outlook.next_retry, outlook.seconds_to_retry
        if not is_hinted:
            fold = "" if first.fold is None else f" --fold {first.fold}"
            session.report.note(f"to retry at once, run mbqueue retry {first.experiment}{fold} in another terminal")
        others = f"; {counted(outlook.delayed - 1, 'other job')} will be retried later" if outlook.delayed > 1 else ""
        session.report.waiting(f"the next attempt at {first.label} is in {format_duration(left)}{others}")
        is_hinted = True
    else:
        session.report.waiting(f"the next jobs are waiting for {counted(outlook.leased, 'job')} in other sessions")
    return is_hinted


def _claim(session: Session, working_set: WorkingSet, searching: Searching) -> Lease | None:
    """Return the job claimed with the last commit, or let searches add trials and claim a new job."""
    lease = session.take_next()
    if lease is not None:
        return lease
    searching.advance()
    return session.queue.claim(
        session.id,
        now=session.clock.now(),
        lease_seconds=session.project.settings.lease_seconds,
        loaded=working_set.fold_key,
        reap=session.heartbeat.may_reap(),
    )


def _idle_ending(session: Session, searching: Searching) -> tuple[Ending, str]:
    """Return BLOCKED if jobs or a search are waiting for the user, otherwise DONE; also return a description.

    Cancelled jobs count as done.
    """
    why = obstacles(session.queue.overview(now=session.clock.now()))
    if searching.is_stuck:
        why.append("a search cannot begin a trial")
    if not why:
        return Ending.DONE, Ending.DONE.value
    return Ending.BLOCKED, f"{Ending.BLOCKED.value}: {', and '.join(why)}"


def _do(session: Session, working_set: WorkingSet, lease: Lease) -> None:
    session.report.job_started(lease.job)
    session.heartbeat.hold(lease)
    try:
        summary = _HANDLERS[lease.job.kind](session, working_set, lease)
    except Stopped as stopped:
        try:
            session.queue.release(lease, reason=str(stopped), now=session.clock.now(), preempted=True)
        except LeaseLost as lost:
            # The session lost the job's lease, so it cannot release the job, but continues with other jobs.
            working_set.forget_fold()
            session.report.note(str(lost))
            return
        session.report.note(f"{lease.job.label}: {stopped}; released.")
        return
    except (LeaseLost, Rewound) as error:
        working_set.forget_fold()
        session.report.note(str(error))
        if isinstance(error, CommitTaken):
            session.give_back_once(lease, error, "the job's commit already existed")
        return
    except MembersNotRecorded as error:
        session.note_once(str(error))
        with suppress(LeaseLost):
            session.queue.release(
                lease,
                reason="a member has not been recorded yet",
                now=session.clock.now(),
                rest_seconds=MEMBERS_SECONDS,
            )
        return
    except StoreError as error:
        working_set.forget_fold()
        session.report.note(f"{lease.job.label}: {error} The steps since the last commit were not saved.")
        if isinstance(error, StoreAway):
            session.give_back(lease, STORE_AWAY, for_others=True)
        else:
            session.give_back_once(lease, error, STORE_AWAY)
        return
    except Exception as error:
        working_set.forget_fold()
        ends = _ends_session(session.project, working_set.device, error)
        if ends is not None:
            found, reason = ends
            session.give_back(lease, reason)
            raise found from (None if found is error else error)
        why = why_lost(working_set.device)
        if why is not None:
            raise DeviceLost(why) from error
        session.fail(lease, error, final=_would_come_out_the_same(error))
        return
    finally:
        session.heartbeat.let_go()
    session.job_done(lease.job, summary)


def _ends_session(project: ProjectFolder, device: torch.device, error: Exception) -> tuple[MbqueueError, str] | None:
    """If the machine caused the failure, return the error to raise and the reason for releasing the job; else None."""
    if is_disk_full(error):
        return DiskFull(_what_to_free(project)), "the disk is full"
    if (limited := why_limited(error)) is not None:
        return limited, "a limit of the system was reached"
    if (full := why_full(error, device)) is not None:
        return full, "the GPU's memory is full"
    return None


def _would_come_out_the_same(error: Exception) -> bool:
    lasting = DataError | SpecError | CheckpointMisfit | TrainingError | ResultsError | RewoundBefore
    return isinstance(error, lasting) and not isinstance(error, SourceAway | CacheError)


def is_disk_full(error: BaseException) -> bool:
    """Whether the cause of an error is a full disk or an exhausted quota."""
    return any(
        isinstance(one, QueueDiskFull) or (isinstance(one, OSError) and one.errno in {errno.ENOSPC, errno.EDQUOT})
        for one in (error, *causes(error, hidden=True))
    )


def _what_to_free(project: ProjectFolder) -> str:
    return (
        f"The disk of {project.live_dir} is full. All commits so far are safe, but the session has to end. Free some "
        "space: `mbqueue cache prune` removes converted data that no unfinished experiment needs. `mbqueue cache prune "
        "--all` removes all converted data, and sessions convert it again when they need it. Logs are in "
        f"{project.logs_dir}. Then continue with: mbqueue work"
    )

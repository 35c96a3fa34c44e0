"""Real sessions that advance only when a test lets them, on a model with one layer.

A session runs `mbqueue.session.worker.work` in a thread that is awake only during `SteppedSession.step`. The session
pauses before and after it claims a job, after each training commit, and if there is no job to claim. So tests can
interleave any number of sessions, and the same order gives the same result. The work of background threads (heartbeat,
publishing, staging of checkpoints) happens when the test asks for it, or at once.
"""

from __future__ import annotations

import atexit
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_family
import torch
from small_project import ManualClock

from mbqueue.drive.publishing import Publisher
from mbqueue.drive.reentry import enter
from mbqueue.experiment import Spec, parse_spec
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.jobs import Job, Lease, State
from mbqueue.queue.store import Queue
from mbqueue.session import worker
from mbqueue.session.crystal_copies import CrystalCopies
from mbqueue.session.heartbeat import Heartbeat
from mbqueue.session.options import WorkOptions
from mbqueue.session.report import Report
from mbqueue.session.searching import Searching
from mbqueue.session.session import Session
from mbqueue.session.stop import StopRequest
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Identity, Manifest
from mbqueue.storage.places import in_folder, named_after
from mbqueue.train import learner, saver
from mbqueue.train.state import deserialise

#: The number of steps in an epoch of `tiny_spec`.
STEPS = 2
STEP_SECONDS = 1.0
#: The first fold of `tiny_spec`.
TINY = Identity(experiment="tiny", fold=0)
RESULTS = "results/daily/2026-01-01/tiny"

_numbers = count(1)
_running: list[SteppedSession] = []
_claim = worker._claim


def tiny_spec(*, folds: tuple[int, ...] = (0, 1), epochs: int = 2) -> Spec:
    """An experiment on twelve real crystals, with `STEPS` steps per epoch."""
    return parse_spec(
        {
            "name": "tiny",
            "folds": folds,
            "data": {"dataset": "sample", "limit": 12},
            "model": {"pretrained": "tiny", "trainable": "head"},
            "train": {"epochs": epochs, "batch_size": 5},
        },
        source="test",
    )


class Died(BaseException):
    """Raised in a session's thread to end the session as if its process had been killed."""


class SteppedSession:
    """One session on one machine; the arguments in ``publishing`` go to its `Publisher`.

    A session begins with a round of publishing, and pauses before its first claim.

    Attributes:
        lease: the lease that the session holds.
        commits: how many training commits the session has published.
        steps_trained: how many steps the session has computed, including steps that were lost when the session died.
        notes: the session's messages.
    """

    def __init__(self, root: Path, live: Path | None, clock: ManualClock, **publishing: Any) -> None:
        self.project = ProjectFolder(root, Settings(checkpoint_minutes=1e-9), live)
        self.clock, self.number = clock, next(_numbers)
        self.notes: list[str] = []
        self.lease: Lease | None = None
        self.commits = self.steps_trained = 0
        self.session: Session
        self.publisher: Publisher
        self.is_dead = self.is_over = self.is_idle = False
        self.publishing = publishing
        self._error: BaseException | None = None
        self._stop = _PausingStop(self)
        self._awake, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"stepped-{self.number}", daemon=True)
        self._thread.start()
        _running.append(self)
        self._resume()

    @property
    def id(self) -> str:
        return self.session.id

    @property
    def queue(self) -> Queue:
        return self.session.queue

    def step(self) -> bool:
        """Let the session claim a job, or work on its job until the next commit; return whether there was a job."""
        if self.is_over:
            return False
        self.session.heartbeat.beat()
        self._resume()
        return not (self.is_idle or self.is_over)

    def publish(self) -> bool:
        """Do one round of publishing."""
        return self.publisher.round()

    def end(self) -> None:
        """Ask the session to stop, and let it end normally."""
        self._stop.request("ended")
        while not self.is_over:
            self._resume()

    def die(self) -> None:
        """Kill the session."""
        self.is_dead = True
        if not self.is_over:
            self._resume()
        self.queue.close()

    # -- the thread ----------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Block the session's thread until the test lets it take the next step."""
        self._paused.release()
        self._awake.acquire()
        if self.is_dead:
            self.queue.end_session = lambda *_, **__: None  # type: ignore[method-assign]
            raise Died

    def _run(self) -> None:
        self._awake.acquire()
        try:
            if self.project.topology.is_mirrored:  # `Project` calls `enter` before a session
                enter(self.project, note=self.notes.append, clock=self.clock)
            options = WorkOptions(device="cpu", forever=True)
            worker.work(self.project, options, report=_Listening(self), stop=self._stop, clock=self.clock)
        except Died:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test gets it
            self._error = error
        self.is_over = True
        _running.remove(self)
        self._paused.release()

    def _resume(self) -> None:
        self.is_idle = False
        with self._surroundings():
            self._awake.release()
            self._paused.acquire()
        if self._error is not None:
            raise self._error

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """While the session's thread is awake, replace parts of mbqueue with this module's simpler versions."""
        tiny_family.worker = self.number
        with ExitStack() as stack:
            stack.enter_context(
                mock.patch.multiple(
                    worker,
                    Session=partial(_PausingSession, self),
                    Searching=partial(_PausingSearching, self),
                    _claim=partial(_claim_between_pauses, self),
                    Publisher=partial(_QuietPublisher, self),
                    Heartbeat=_QuietHeartbeat,
                    CrystalCopies=_CopiesAtOnce,
                )
            )
            stack.enter_context(mock.patch.object(saver, "ThreadPoolExecutor", _AtOnce))
            # Leave out the random states: they add thousands of numbers to a checkpoint, but this training needs none.
            stack.enter_context(
                mock.patch.multiple(learner, random_states=lambda _device: {}, restore_random_states=lambda *_: None)
            )
            stack.enter_context(mock.patch.object(ProjectFolder, "cache_dir", _cache()))
            yield


def _claim_between_pauses(stepped: SteppedSession, session: Session, *arguments: Any) -> Lease | None:
    if (lease := session.take_next()) is not None:
        return lease
    stepped.lease = _claim(session, *arguments)
    if stepped.lease is not None:
        stepped.pause()
    return stepped.lease


class _PausingSearching(Searching):
    def __init__(self, stepped: SteppedSession, session: Session) -> None:
        super().__init__(session)
        self._stepped = stepped

    def advance(self) -> None:
        super().advance()
        self._stepped.pause()


class _PausingSession(Session):
    def __init__(self, stepped: SteppedSession, **fields: Any) -> None:
        super().__init__(**fields)
        self._stepped = stepped
        stepped.session = self

    def take_next(self) -> Lease | None:
        self._stepped.lease = super().take_next()
        return self._stepped.lease

    def saved(self, seconds: float) -> None:
        super().saved(seconds)
        self._stepped.commits += 1
        self._stepped.pause()


class _QuietPublisher(Publisher):
    def __init__(self, stepped: SteppedSession, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | stepped.publishing)
        self._stepped = stepped
        stepped.publisher = self

    def __enter__(self) -> _QuietPublisher:
        self.round()
        return self

    def __exit__(self, *_exception: object) -> None:
        if not self._stepped.is_dead:
            self.round(ended="the session is over")


class _Listening(Report):
    def __init__(self, session: SteppedSession) -> None:
        self._session = session

    def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
        if what == "step":
            self._session.steps_trained += 1
            self._session.clock.advance(STEP_SECONDS)

    def job_failed(self, job: Job, error: BaseException, retry_at: float | None) -> None:
        raise AssertionError(f"{job.label} failed") from error

    def note(self, text: str) -> None:
        self._session.notes.append(text)


class _PausingStop(StopRequest):
    def __init__(self, session: SteppedSession) -> None:
        super().__init__()
        self._session = session

    def wait(self, seconds: float) -> bool:
        if self.cause is None:
            self._session.is_idle = True
            self._session.pause()
        return self.cause is not None


class _QuietHeartbeat(Heartbeat):
    def __enter__(self) -> _QuietHeartbeat:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass


class _CopiesAtOnce(CrystalCopies):
    def keep(self, shared: Any, file: Path, dataset_hash: str) -> None:
        self._keep(shared, file, dataset_hash)


class _AtOnce(Executor):
    def __init__(self, **_options: Any) -> None:
        pass

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **options))
        return future


@cache
def _cache() -> Path:
    """The crystal cache for all sessions in this process, so that each test need not convert the crystals again."""
    folder = tempfile.TemporaryDirectory(prefix="mbqueue-tiny-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def end_all() -> None:
    """End all sessions that a test has left running."""
    while _running:
        with suppress(Exception):
            _running[-1].die()


def lineage_of(folder: Path, stem: str) -> list[int]:
    """Return the number of the session that computed each training step of a checkpoint."""
    state = deserialise((folder / f"{stem}.pt").read_bytes())
    steps: list[int] = state.model["lineage"][: state.steps_done].tolist()
    assert torch.count_nonzero(state.model["lineage"]) == state.steps_done, "a step was counted twice, or not at all"
    return steps


def newest_whole(folder: Path, on_wrong: Callable[[str], object]) -> Manifest | None:
    """Return the manifest of the newest intact commit in a local folder, or None; change nothing there."""
    commits = Commits(in_folder(folder), named_after(folder), lambda base, why: on_wrong(f"{base}: {why}") and None)
    newest = commits.newest()
    return None if newest is None else newest.manifest


def is_done(queue: Queue) -> bool:
    """Whether every job is committed or skipped."""
    jobs = queue.jobs()
    return bool(jobs) and all(job.state in {State.COMMITTED, State.SKIPPED} for job in jobs)


class LocalProject:
    """A project on a local disk with two folds of `tiny_spec`."""

    def __init__(self, root: Path, clock: ManualClock) -> None:
        self.project, self.clock = init_project(root)[0], clock
        self.sessions: list[SteppedSession] = []
        with Queue(self.project.queue_db) as queue:
            queue.enqueue(tiny_spec(), results_dir=RESULTS, now=clock.now(), priority=3)

    def train(self, commits: int) -> SteppedSession:
        """Start a session, and return it, still running, once it has published ``commits`` commits."""
        session = SteppedSession(self.project.root, self.project.live, self.clock)
        self.sessions.append(session)
        while session.commits < commits:
            self.clock.advance(1.0)
            assert session.step()
        return session

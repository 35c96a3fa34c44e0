"""If a mount starts to hang during a read, sessions still train and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_project import ManualClock, RememberedReport, enqueue, make_split_project, small_spec
from stepped_session import RESULTS, SteppedSession, is_done, tiny_spec

from mbqueue.drive import publishing
from mbqueue.drive.livestate import publishing_status
from mbqueue.drive.publishing import Publisher
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.store import Queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending, StopCause, StopKind
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import work
from mbqueue.storage.mounted import Drive

#: A time limit in seconds that is much longer than any test should take.
FOR_EVER = 120.0


class HangingDrive(Drive):
    """A drive that hangs from read number `hangs_at`, unless it is None, until the test sets `back`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.hangs_at: int | None = None
        self.reads, self.hangs, self.back = 0, threading.Event(), threading.Event()

    def read(self, path: str, *, at_most: int) -> bytes:
        self.reads += 1
        if self.hangs_at is not None and self.reads >= self.hangs_at and not self.back.is_set():
            self.hangs.set()
            self.back.wait(FOR_EVER)
        return super().read(path, at_most=at_most)


class Two:
    """Two machines that see each other and share a project of two folds; the first has trained its fold further."""

    def __init__(self, base: Path) -> None:
        self.clock, self.stop = ManualClock(), StopRequest()
        root = init_project(base / "drive")[0].root
        project = ProjectFolder(root, Settings(), base / "made")
        project.live_dir.mkdir()
        with Queue(project.queue_db) as queue:
            queue.enqueue(tiny_spec(), results_dir=RESULTS, now=self.clock.now())
        assert Publisher(project, None, note=lambda _text: None, clock=self.clock).round()
        self.drive = HangingDrive(root)
        self.first = SteppedSession(root, base / "first", self.clock)
        self.train(self.first)
        self.first.publish()
        self.second = SteppedSession(
            root, base / "second", self.clock, drive=self.drive, should_stop=lambda: self.stop.cause is not None
        )
        for _ in range(2):
            self.train(self.first)
            self.first.publish()
        self.second.publish()
        assert [other.session.id for other in self.second.publisher.others] == [self.first.id]

    def train(self, session: SteppedSession) -> None:
        """Train until the session has published one more commit."""
        goal = session.commits + 1
        while session.commits < goal:
            self.clock.advance(5.0)
            assert session.step()

    def look(self) -> list[tuple[int, int]]:
        """Let the second machine read what the first has newly published."""
        self.clock.advance(publishing.RECONCILE_SECONDS)
        return self.second.publisher.reconcile(self.second.queue, now=self.clock.monotonic())


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    yield made
    made.drive.back.set()


def test_training_continues_and_later_converges_wherever_reading_the_mount_hangs(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "READ_SECONDS", 1.0)
    # Set all waits to zero: if the clock advanced, the first session would count as dead.
    monkeypatch.setattr(publishing, "LONGEST_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(publishing, "RECONCILE_SECONDS", 0.0)
    for n_hung in range(20):
        two.drive.back.clear()
        two.drive.hangs.clear()
        two.drive.hangs_at = two.drive.reads + 1  # make the next read hang; the results of earlier reads are cached
        began = time.monotonic()
        taken = two.look()
        assert time.monotonic() - began < FOR_EVER / 2
        if not two.drive.hangs.is_set():
            break
        assert taken == []
        told = publishing_status(two.second.project)
        assert told is not None
        assert told["state"] == "degraded", n_hung
        assert "not answered" in told["why"]
        two.drive.back.set()  # release the hanging read; the next read hangs too
    assert n_hung == 4, "what was read by threads that were left behind is read again"
    assert len(taken) == 1
    assert any("DEGRADED" in note for note in two.second.notes)
    two.train(two.second)
    two.drive.hangs_at = None
    for _ in range(200):
        if is_done(two.second.queue):
            break
        two.clock.advance(20.0)
        for session in (two.first, two.second):
            session.step()
            session.publish()
    assert is_done(two.second.queue)
    assert two.first.steps_trained + two.second.steps_trained == 8, "a step was done twice"


def test_a_fold_adopted_before_the_mount_hung_is_reported(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the adopted fold were not reported, the session would keep an outdated model loaded."""

    def hang(*_arguments: object) -> None:
        raise TimeoutError("it has not answered")

    monkeypatch.setattr("mbqueue.drive.reentry.Reentry._results", hang)
    (experiment,) = two.second.queue.experiments()
    fold = next(job.fold for job in two.first.queue.jobs() if job.fold is not None and job.started)
    assert two.look() == [(experiment.id, fold)]


def test_a_stopping_session_does_not_wait_for_the_mount(two: Two) -> None:
    two.drive.hangs_at = two.drive.reads + 2
    threading.Thread(target=lambda: two.drive.hangs.wait(FOR_EVER) and two.stop.request(_terminated())).start()
    began = time.monotonic()
    assert two.look() == []
    assert time.monotonic() - began < publishing.READ_SECONDS / 2
    told = publishing_status(two.second.project)
    assert told is not None
    assert told["state"] != "degraded", "nothing is known to be wrong with the mount"


def test_a_session_begins_even_if_its_first_round_hangs(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "FIRST_ROUND_SECONDS", 0.2)
    two.drive.hangs_at = two.drive.reads + 1
    publisher = Publisher(
        two.second.project, two.second.id, note=two.second.notes.append, clock=two.clock, drive=two.drive
    )
    began = time.monotonic()
    with publisher:
        assert time.monotonic() - began < FOR_EVER / 2
        assert two.drive.hangs.wait(FOR_EVER)
        assert publisher.others == []
        two.drive.back.set()
    assert [other.session.id for other in publisher.others] == [two.first.id]


def _terminated() -> StopCause:
    return StopCause(StopKind.SIGNAL, "SIGTERM", 15)


def test_a_real_session_stops_while_reading_the_mount_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    project = make_split_project(tmp_path)
    enqueue(project, small_spec(project, train__epochs=1, data__limit=20))
    hangs, back, stop, names = threading.Event(), threading.Event(), StopRequest(), Drive.names

    def hang(self: Drive, folder: str) -> list[str]:
        if threading.current_thread().name == "mbqueue-look":
            hangs.set()
            back.wait(FOR_EVER)
        return names(self, folder)

    def terminate() -> None:
        assert hangs.wait(FOR_EVER)
        stop.request(_terminated())

    monkeypatch.setattr(Drive, "names", hang)
    other = SimpleNamespace(session=SimpleNamespace(id="29991231T235959Z"))  # a session that started later
    others: Any = property(lambda _self: [other])
    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "others", others)
        threading.Thread(target=terminate).start()
        began = time.monotonic()
        try:
            outcome = work(project, WorkOptions(device="cpu"), report=RememberedReport(), stop=stop)
            assert not back.is_set()
        finally:
            back.set()
    assert outcome.ending is Ending.STOPPED
    assert time.monotonic() - began < publishing.READ_SECONDS
    assert work(project, WorkOptions(device="cpu"), report=RememberedReport()).ending is Ending.DONE

"""The next job is claimed with the previous one's commit, and released if the session must end."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import Job, State
from mbqueue.queue.sqlite import SqliteFile
from mbqueue.queue.store import Queue
from mbqueue.session.heartbeat import Heartbeat
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import work


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inference(tmp_path: Path) -> ProjectFolder:
    """A project with an experiment of three jobs: prepare, predict, record."""
    project = make_project(tmp_path / "project")
    enqueue(project, small_spec(project, "pretrained_infer"))
    return project


def test_a_session_claims_each_next_job_with_the_commit_of_the_one_before(inference: ProjectFolder) -> None:
    report = RememberedReport()
    assert work(inference, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    with Queue(inference.queue_db, read_only=True) as queue:
        events = sorted(queue.events(), key=lambda event: event.id)
    steps = [(event.kind, event.to_state, event.at) for event in events if event.to_state in {"leased", "committed"}]
    assert [(kind, state) for kind, state, _ in steps] == [
        (kind, state) for kind in ("prepare", "predict", "record") for state in ("leased", "committed")
    ]
    assert all(committed[2] == claimed[2] for committed, claimed in pairwise(steps) if claimed[1] == "leased")


def test_a_claimed_job_that_was_not_begun_is_released_unchanged(inference: ProjectFolder) -> None:
    stop = StopRequest()

    class StopsBetween(RememberedReport):
        def job_finished(self, job: Job, summary: str) -> None:
            stop.request("enough")

    assert work(inference, WorkOptions(device="cpu"), report=StopsBetween(), stop=stop).reason == "enough"
    with Queue(inference.queue_db, read_only=True) as queue:
        (predict,) = (job for job in queue.jobs() if job.kind == "predict")
        assert (predict.state, predict.fence, predict.preemptions, predict.failures) == (State.READY, 1, 0, 0)
        assert predict.changed_why == "released: enough"


@pytest.mark.parametrize("may_reap", [False, True])
def test_a_suspended_session_claims_nothing_that_another_may_hold(
    inference: ProjectFolder, monkeypatch: pytest.MonkeyPatch, may_reap: bool
) -> None:
    with Queue(inference.queue_db) as queue:
        now = time.time() - 1000
        other = queue.start_session(device="cpu", now=now, alive_seconds=60)
        assert queue.claim(other, now=now, lease_seconds=60) is not None
    monkeypatch.setattr(Heartbeat, "may_reap", lambda _self: may_reap)
    outcome = work(inference, WorkOptions(device="cpu", idle_seconds=0.1), report=RememberedReport())
    assert outcome.ending is (Ending.DONE if may_reap else Ending.STOPPED)


def test_nothing_is_claimed_after_max_jobs(inference: ProjectFolder) -> None:
    outcome = work(inference, WorkOptions(device="cpu", max_jobs=1), report=RememberedReport())
    assert (outcome.ending, outcome.jobs_done) == (Ending.STOPPED, 1)
    with Queue(inference.queue_db, read_only=True) as queue:
        assert [job.fence for job in queue.jobs()] == [1, 0, 0]


def test_a_commit_that_succeeds_but_reports_failure_leaves_no_job_leased(
    inference: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, lies = SqliteFile.writing, iter([True])

    @contextmanager
    def lying(self: SqliteFile) -> Iterator[Any]:
        with writing(self) as db:
            yield db
            done = db.execute("SELECT count(*) FROM jobs WHERE state = 'committed'").fetchone()[0]
        if done == 1 and next(lies, False):
            with self._translating():
                raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(SqliteFile, "writing", lying)
    report = RememberedReport()
    assert work(inference, WorkOptions(device="cpu"), report=report).ending is Ending.DONE, report.lines
    with Queue(inference.queue_db, read_only=True) as queue:
        assert [(job.state, job.fence, job.lost_in_a_row) for job in queue.jobs()] == [(State.COMMITTED, 1, 0)] * 3

"""A queue is replaced only while no session is using it. A session that still has the old queue writes nothing more."""

from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from processes import freeze, run, start, until
from small_project import ManualClock, enqueue, make_newer, make_project, small_spec

from mbqueue.drive.recovery import move_queue_aside
from mbqueue.errors import QueueError, SchemaTooNew, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.store import Queue


def test_a_silent_live_session_keeps_its_queue_and_one_that_lost_it_writes_nothing(
    tmp_path: Path,
) -> None:
    project = make_project(tmp_path, lease_seconds=2.0)
    enqueue(project, small_spec(project, train__epochs=50))
    log = tmp_path / "log"
    process = start(project.root, "work", "--device", "cpu", log=log)
    until(lambda: bool(list(project.checkpoints_dir("full_finetune", 0).glob("e*.json"))), process)
    freeze(process, project.queue_db)
    try:
        with Queue(project.queue_db, read_only=True) as queue:
            until(lambda: not queue.sessions()[0].is_live(time.time()))
        refused = run(project.root, "recover", "--force")
        assert refused.returncode == 2
        assert "End it first: mbqueue stop" in refused.stderr
        # Pretend that the session is running in a different container, where `recover` cannot see it.
        with closing(sqlite3.connect(project.queue_db)) as connection, connection:
            connection.execute("UPDATE sessions SET boot_id = 'another'")
        replaced = run(project.root, "recover", "--force")
        assert replaced.returncode == 0, replaced.stderr
        commits = _commits(project)
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 1, log.read_text()
    assert "the queue was replaced" in log.read_text()
    assert _commits(project) == commits
    with Queue(project.queue_db, read_only=True) as queue:
        assert queue.sessions() == ()


def _commits(project: ProjectFolder) -> list[str]:
    return sorted(path.name for path in project.checkpoints_dir("full_finetune", 0).glob("e*.json"))


def _enqueued(tmp_path: Path) -> ProjectFolder:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project))
    return project


@pytest.mark.parametrize("force", [False, True])
def test_a_queue_that_a_newer_mbqueue_wrote_is_not_replaced(tmp_path: Path, clock: ManualClock, force: bool) -> None:
    project = _enqueued(tmp_path)
    make_newer(project.queue_db)
    with pytest.raises(SchemaTooNew):
        move_queue_aside(project, force=force, clock=clock)
    assert project.queue_db.exists()


def test_a_queue_that_cannot_be_read_now_does_not_count_as_damaged(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _enqueued(tmp_path)

    def fail(*_arguments: object) -> None:
        raise QueueError("locked by another process")

    monkeypatch.setattr("mbqueue.queue.sqlite.SqliteFile.reading", fail)
    with pytest.raises(QueueError, match="locked"):
        move_queue_aside(project, force=False, clock=clock)
    assert project.queue_db.exists()


@pytest.mark.parametrize("damage", ["garbage", "other tables", "empty"])
def test_a_queue_that_is_not_intact_is_replaced_without_force(tmp_path: Path, clock: ManualClock, damage: str) -> None:
    project = _enqueued(tmp_path)
    if damage == "garbage":
        project.queue_db.write_bytes(b"not a database at all" * 500)
    elif damage == "other tables":
        with closing(sqlite3.connect(project.queue_db)) as connection:
            connection.execute("ALTER TABLE jobs RENAME TO works")
    else:
        project.queue_db.write_bytes(b"")
        commit = project.checkpoints_dir("full_finetune", 0) / "e0001-done-f0001.json"
        commit.parent.mkdir(parents=True)
        commit.write_text("{}")
        status = run(project.root, "status")
        assert status.returncode == 1
        assert "content was lost" in status.stderr
        assert "mbqueue recover" in status.stderr
    aside = move_queue_aside(project, force=False, clock=clock)
    assert aside is not None
    assert aside.exists()


def test_an_empty_queue_without_checkpoints_counts_as_intact(tmp_path: Path, clock: ManualClock) -> None:
    project = make_project(tmp_path)
    Queue(project.queue_db).close()
    with pytest.raises(UsageError, match="--force"):
        move_queue_aside(project, force=False, clock=clock)


def test_a_session_of_this_process_that_could_not_record_its_end_does_not_block(
    tmp_path: Path, clock: ManualClock
) -> None:
    project = _enqueued(tmp_path)
    with Queue(project.queue_db) as queue:
        queue.start_session(device="cpu", now=clock.now(), alive_seconds=60)
    with pytest.raises(UsageError, match="mbqueue stop"):
        move_queue_aside(project, force=True, clock=clock)
    clock.advance(61)
    assert move_queue_aside(project, force=True, clock=clock) is not None

"""On a cluster's file system, moving the queue moves the live folder, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import ManualClock
from stepped_session import LocalProject, is_done

from mbqueue import Project, mounts
from mbqueue.errors import QueueError
from mbqueue.project import ENVIRONMENT_VARIABLE
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue
from mbqueue.topology import LIVE_VARIABLE, QUEUE_VARIABLE


@pytest.fixture
def shared(tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> LocalProject:
    """A project on NFS with commits, whose queue was on a server that no longer exists."""
    shared = LocalProject(tmp_path / "project", clock)
    session = shared.train(5)
    session.end()
    for path in shared.project.state_dir.glob("queue.db*"):
        path.unlink()
    mount = mounts.Mount(point=shared.project.root, fstype="nfs4", source="server:/x")
    monkeypatch.setattr("mbqueue.topology.mount_of", lambda _path: mount)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name in (ENVIRONMENT_VARIABLE, LIVE_VARIABLE, QUEUE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return shared


@pytest.mark.parametrize("with_wanted", [True, False], ids=["what was asked for", "commits alone"])
def test_recovering_without_the_server_finds_the_commits_of_its_sessions(
    shared: LocalProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, with_wanted: bool
) -> None:
    monkeypatch.setenv(QUEUE_VARIABLE, "sqlite")
    if with_wanted:
        (shared.project.notes_dir).mkdir()
    project = Project(shared.project.root)
    assert project.folder.live
    assert "mbqueue recover" in caplog.text
    found = project.recover()
    assert sum(epochs for _, _, epochs in found.folds) >= 2
    with Queue(project.folder.queue_db, read_only=True) as queue:
        done = {(job.fold, job.epoch) for job in queue.jobs(state=State.COMMITTED) if job.epoch}
    assert done
    for fold, epoch in done:
        folder = project.folder.checkpoints_dir("tiny", fold or 0)
        assert list(folder.glob(f"e{epoch:04d}-done-*.pt")), "the queue speaks of a commit that is not in its folder"
    project.back_up(shared.project.root.parent / "b.tar")


def test_recovering_finds_commits_of_the_live_folder_that_never_reached_the_mount(
    shared: LocalProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    Project(shared.project.root).recover()
    project = Project(shared.project.root)
    before = project.recover(force=True).folds
    on_the_mount = list((shared.project.state_dir / "checkpoints").rglob("*.*"))
    assert on_the_mount
    for path in on_the_mount:
        path.unlink()
    project.folder.queue_db.write_bytes(b"garbage" * 1000)
    assert project.recover().folds == before


def test_a_session_continues_with_a_queue_that_was_recovered_without_the_server(shared: LocalProject) -> None:
    Project(shared.project.root).recover()
    shared.project = Project(shared.project.root).folder
    session = shared.train(1)
    for _ in range(30):
        session.step()
    assert is_done(session.queue)
    session.end()
    assert sum(one.steps_trained for one in shared.sessions) == 8, "what the others had trained was trained again"


@pytest.mark.parametrize("live", [None, "live"], ids=["local", "split"])
def test_recovering_without_commits_is_an_error_that_names_the_old_queue(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, live: str | None
) -> None:
    root = LocalProject(tmp_path / "project", clock).project.root
    (root / "state/queue.db").write_bytes(b"garbage" * 1000)
    if live is not None:
        (tmp_path / live).mkdir()
        (root / "state/queue.db").rename(tmp_path / live / "queue.db")
        monkeypatch.setenv(LIVE_VARIABLE, str(tmp_path / live))
    with pytest.raises(QueueError, match=r"nothing to rebuild a queue from.*is now .*queue\.db\.replaced-"):
        Project(root).recover(force=True)

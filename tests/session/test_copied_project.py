"""A project copied with `cp -r` while a session runs in the original: the copy never affects the original."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import start_in_background, until
from small_project import RememberedReport, make_project

from mbqueue.api import Project
from mbqueue.belonging import Belonging
from mbqueue.errors import UsageError
from mbqueue.project import init_project
from mbqueue.queue.store import Queue
from mbqueue.session import background
from mbqueue.session.background import BackgroundSession
from mbqueue.session.options import WorkOptions
from mbqueue.session.worker import work
from mbqueue.topology import LIVE_VARIABLE


class Pair:
    """A project with a session in the background, and a copy of the project made during the session."""

    def __init__(self, base: Path) -> None:
        folder = make_project(base / "original", checkpoint_minutes=60.0, lease_seconds=3600.0)
        self.original = Project(folder.root)
        small = {"data.limit": 40, "train.batch_size": 8}
        self.original.enqueue("full_finetune", folds=[0], epochs=1000, dataset="sample", settings=small)
        self.session: BackgroundSession = start_in_background(folder, "--device", "cpu")
        until(lambda: any(job.state == "leased" for job in self.jobs(self.original)))
        shutil.copytree(folder.root, base / "copy")
        self.copy = Project(base / "copy")

    @staticmethod
    def jobs(project: Project) -> tuple[object, ...]:
        with Queue(project.folder.queue_db, read_only=True) as queue:
            return queue.jobs()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.original.stop()


def test_the_copy_does_not_stop_wait_for_or_show_sessions_of_the_original(pair: Pair) -> None:
    assert pair.copy.stop() == []
    assert pair.session.is_running
    assert background.current(pair.copy.folder) is None
    assert not pair.copy.status().is_active
    assert pair.original.status().is_active

    report = RememberedReport()
    assert work(pair.copy.folder, WorkOptions(device="cpu", max_jobs=1), report=report).jobs_done == 1, report.lines
    with Queue(pair.copy.folder.queue_db, read_only=True) as queue:
        reasons = [row.end_reason or "" for row in queue.sessions()]
        assert any("uses the queue from which this one was copied" in reason for reason in reasons)
    assert pair.session.is_running

    pair.copy.recover(force=True)  # allowed, because no session is using the copy's queue
    with pytest.raises(UsageError, match="is using"):
        pair.original.recover(force=True)
    (stopped,) = pair.original.stop()
    assert stopped.session == pair.session.session


def test_the_copy_has_a_background_session_of_its_own_and_says_whose_log_it_shows(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    followed = "".join(pair.copy.log(follow=True))  # returns although the original's session still runs
    assert str(pair.session.session) in followed
    assert f"{pair.copy.folder.root} was copied or moved, and this log is from the original folder" in caplog.text
    caplog.clear()

    pair.copy.pause("full_finetune")  # the next session then finds nothing to do, and ends
    started = start_in_background(pair.copy.folder, "--device", "cpu")
    assert started.session is not None
    assert started.session != pair.session.session
    assert started.log.parent == pair.copy.folder.logs_dir
    assert started.session in "".join(pair.copy.log(follow=True))
    assert not caplog.text
    assert pair.session.is_running

    archive = tmp_path / "archive.tar"
    pair.copy.back_up(archive)
    pair.copy.restore(archive, force=True)
    with pytest.raises(UsageError, match=f"Session {pair.session.session} .* is using"):
        pair.original.restore(archive, force=True)
    assert pair.session.is_running


def test_a_project_moved_while_its_session_runs_can_still_stop_it(pair: Pair, tmp_path: Path) -> None:
    pair.original.folder.root.rename(tmp_path / "moved")
    pair.original = Project(tmp_path / "moved")
    (stopped,) = pair.original.stop()
    assert stopped.session == pair.session.session


def test_a_copy_on_a_drive_does_not_take_the_live_folder_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIVE_VARIABLE, str(tmp_path / "live"))
    root = init_project(tmp_path / "drive")[0].root
    Project(root).enqueue("head_finetune", dataset="sample")
    shutil.copytree(root, tmp_path / "copy")
    with pytest.raises(UsageError, match=r"belongs to .*drive; .*copy is a copy of that project.*--live-dir"):
        Project(tmp_path / "copy").status()
    belonging = Belonging.of(tmp_path / "live")
    assert belonging is not None
    assert belonging.root == str(root)
    root.rename(tmp_path / "moved")  # the drive seems to be mounted elsewhere; mbqueue must still find the live folder
    assert Project(tmp_path / "moved").status()

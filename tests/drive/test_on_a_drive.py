"""Real training on an unreliable drive, and on a full disk."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lying_drive import LyingDrive
from processes import outcome
from small_project import RememberedReport, enqueue, make_project, small_spec
from stepped_session import newest_whole

from mbqueue.drive.livestate import publishing_status
from mbqueue.drive.publishing import Publisher
from mbqueue.drive.reentry import enter
from mbqueue.errors import DiskFull
from mbqueue.project import ProjectFolder, Settings
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue
from mbqueue.session.options import WorkOptions
from mbqueue.session.stop import StopRequest
from mbqueue.session.worker import Ending, work
from mbqueue.train.checkpoint import Checkpoints

#: An experiment with four small steps in an epoch.
FOUR_STEPS = {"data__limit": 24, "train__batch_size": 5}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sessions_that_die_on_an_unreliable_drive_give_the_bytes_of_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All sessions run in this process, so killed sessions seem to be alive, but later sessions must not wait for them.
    monkeypatch.setattr("mbqueue.drive.announcements.ALIVE_SECONDS", 0.1)
    straight = make_project(tmp_path / "straight", checkpoint_minutes=60.0)
    expected = enqueue(straight, small_spec(straight, **FOUR_STEPS))
    assert work(straight, WorkOptions(device="cpu"), report=RememberedReport()).ending is Ending.DONE

    drive = LyingDrive(tmp_path / "drive", random.Random(5))
    settings = Settings(checkpoint_minutes=1e-6)  # a checkpoint after every step
    resumed_at: list[int] = []
    for number in range(14):
        client = drive.connect()
        drive.deliver(client, share=1.0)
        project = ProjectFolder(client.folder, settings, tmp_path / f"live{number}")
        report, stop = RememberedReport(), StopRequest()
        enter(project, note=report.note)
        if number == 0:
            enqueue(project, small_spec(straight, **FOUR_STEPS))
            assert Publisher(project, None, note=report.note, clock=_clock()).round()
            drive.settle()  # let the drive upload the enqueued experiment
        steps: list[int] = []

        def disturb(_job: object, what: str, done: int, _total: int, *, number: int = number) -> None:
            if what != "step":
                return
            steps.append(done)  # noqa: B023 - used within the round
            drive.move()
            if number % 3 == 1 and len(steps) == 1:  # noqa: B023
                client.lose_mount()  # noqa: B023
            if len(steps) == 2:  # noqa: B023
                stop.request("SIGTERM")  # noqa: B023

        report.on_advanced = disturb
        done = work(project, WorkOptions(device="cpu"), report=report, stop=stop)
        resumed_at += steps[:1]
        if done.ending is Ending.DONE:
            client.remount()  # the mount may have been lost when the session ended
            assert Publisher(project, None, note=report.note, clock=_clock()).round()
            drive.settle()
            break
        if number % 3 == 1:
            told = publishing_status(project)
            assert told is not None
            assert told["state"] == "degraded"
            assert any("DEGRADED" in line for line in report.lines)
        if number % 2 or number > 4:
            drive.settle()  # complete all uploads, because `kill` may lose or truncate files that are not uploaded
        drive.kill(client)
    else:
        pytest.fail(f"it was never done: {report.lines}")
    assert len(resumed_at) > 3, "nothing was interrupted"
    results = client.folder / expected.relative_to(straight.root)
    assert outcome(results, 0) == outcome(expected, 0)


def _clock() -> Any:
    from mbqueue.clock import SystemClock

    return SystemClock()


def test_a_full_disk_ends_the_session_with_the_last_commit_safe_and_says_what_to_free(
    tmp_path: Path, report: RememberedReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path)
    enqueue(project, small_spec(project, train__epochs=1, **FOUR_STEPS))
    stage, staged = Checkpoints.stage, []

    def stage_until_full(self: Checkpoints, content: bytes, fields: Any) -> Any:
        if len(staged) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        staged.append(fields["step"])
        return stage(self, content, fields)

    monkeypatch.setattr(Checkpoints, "stage", stage_until_full)
    with pytest.raises(DiskFull, match="mbqueue cache prune"):
        work(project, WorkOptions(device="cpu"), report=report)
    newest = newest_whole(project.checkpoints_dir("full_finetune", 0), pytest.fail)
    assert newest is not None
    with Queue(project.queue_db, read_only=True) as queue:
        assert not queue.jobs(state=State.LEASED)
        assert sum(job.failures for job in queue.jobs()) == 0
    monkeypatch.undo()
    assert work(project, WorkOptions(device="cpu"), report=report).ending is Ending.DONE

"""If the program that reads a session's output exits, the session keeps running and ends normally."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from inspect import Parameter, signature
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from processes import until
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.project import ProjectFolder, init_project
from mbqueue.queue.jobs import Job, State
from mbqueue.queue.store import Queue
from mbqueue.session.report import EVENTS, Relay, Report

WORK_LEFT = 75


@pytest.fixture
def project(tmp_path: Path) -> ProjectFolder:
    """A project with long work, whose sessions create a file when they end."""
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    with (tmp_path / "mbqueue.toml").open("a") as settings:
        settings.write(
            f'end_command = "touch {tmp_path}/ended"\n'
            f'[notify]\ncommand = \'echo "$MBQUEUE_TEXT" >> {tmp_path}/told\'\nevents = ["session ended"]\n'
        )
    enqueue(project, small_spec(project, data__limit=20, train__epochs=50))
    return init_project(tmp_path)[0]


def begin(project: ProjectFolder, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a session in the foreground."""
    return subprocess.Popen(
        [sys.executable, "-m", "mbqueue", "--project", str(project.root), "work", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **streams,
    )


def commits(project: ProjectFolder) -> int:
    return len(list(project.checkpoints_dir("full_finetune", 0).glob("e*.json")))


def require_graceful_end(project: ProjectFolder, reason: str) -> None:
    """Check that the session reported its end to every reader that is still there."""
    with Queue(project.queue_db, read_only=True) as queue:
        (session,) = queue.sessions()
        jobs = queue.jobs()
    assert session.end_reason == reason
    assert not [job for job in jobs if job.state is State.LEASED or job.failures]
    assert (project.root / "ended").exists()
    assert reason in (project.root / "told").read_text()


def test_a_session_whose_pipe_is_closed_keeps_running_and_stops_gracefully(project: ProjectFolder) -> None:
    process = begin(project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # close the pipe, as `| head -1` does
    until(lambda: commits(project) > 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == WORK_LEFT
    require_graceful_end(project, "SIGTERM")


def test_a_session_whose_terminal_is_closed_ends_gracefully(project: ProjectFolder) -> None:
    ours, its = pty.openpty()
    process = begin(project, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    os.set_blocking(ours, False)

    def read_and_look() -> bool:
        with suppress(BlockingIOError):
            os.read(ours, 65536)  # empty the terminal's buffer, so that the session does not block
        return commits(project) > 1

    until(read_and_look, process)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == WORK_LEFT
    require_graceful_end(project, "SIGHUP")


def test_a_listener_that_cannot_write_is_dropped_and_the_others_are_told(
    report: RememberedReport,
) -> None:
    class Full(Report):
        calls = 0

        def advanced(self, job: Job, what: str, done: int, total: int, facts: Mapping[str, float]) -> None:
            self.calls += 1
            raise OSError(errno.ENOSPC, "full")

    full, steps = Full(), []
    report.on_advanced = lambda *_: steps.append(1)
    relay = Relay(full, report)
    for done in range(3):
        relay.advanced(None, "step", done, 3, {})  # type: ignore[arg-type]
    assert (full.calls, len(steps)) == (1, 3)
    assert report.lines == ["note: Full can no longer write, so it receives no more events: [Errno 28] full"]


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_reaches_every_listener_unchanged(event: str) -> None:
    kinds = {name: one.kind for name, one in signature(getattr(Report(), event)).parameters.items()}
    given = [name for name, kind in kinds.items() if kind is not Parameter.KEYWORD_ONLY]
    named = {name: object() for name in kinds if name not in given}
    first, second = (create_autospec(Report, instance=True) for _ in range(2))
    getattr(Relay(first, second), event)(*given, **named)
    for listener in (first, second):
        getattr(listener, event).assert_called_once_with(*given, **named)

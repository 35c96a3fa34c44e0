"""A session in the background, as a real process: one at a time, followed and stopped gracefully."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run, start_in_background, until
from small_project import enqueue as put
from small_project import make_project, small_spec

from mbqueue.api import Project
from mbqueue.cli import main
from mbqueue.errors import SessionError, UsageError
from mbqueue.queue.jobs import State
from mbqueue.queue.processes import has_open
from mbqueue.queue.store import Queue
from mbqueue.session import background


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = make_project(tmp_path / "project", checkpoint_minutes=60.0)
    put(folder, small_spec(folder, train__epochs=1000))
    return Project(folder.root)


def test_a_session_in_the_background_is_the_only_one_and_ends_gracefully(project: Project) -> None:
    started = start_in_background(project.folder, "--device", "cpu")
    try:
        assert started.is_running
        assert started.session is not None
        with pytest.raises(UsageError, match="mbqueue stop"):
            project.work_in_background()
        until(lambda: project.status().overview["jobs"]["committed"] >= 1)
        assert project.status().is_active
    finally:
        (stopped,) = project.stop()
    assert (stopped.session, stopped.reason) == (started.session, "SIGTERM")
    assert not started.is_running
    with Queue(project.folder.queue_db, read_only=True) as queue:
        assert not queue.jobs(state=State.LEASED)
        assert not any(job.failures or job.lost_in_a_row for job in queue.jobs())

    said = run(project.folder.root, "logs", "-f")  # `logs -f` stops by itself, because the session has ended
    assert said.returncode == 0
    assert f"session {started.session}" in said.stdout
    assert "SIGTERM" in said.stdout
    assert "No session" in run(project.folder.root, "stop").stdout


def test_a_session_that_cannot_start_is_reported_with_its_last_lines(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no module named mbqueue >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(SessionError, match=r"(?s)code 3.*no module named mbqueue"):
        project.work_in_background()
    assert project.stop() == []


def test_a_session_that_ends_at_once_counts_as_started_whatever_the_clocks_say(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = tmp_path / "python"
    quick.write_text(
        f"#!{sys.executable}\n"
        "from pathlib import Path\n"
        "from mbqueue.queue.store import Queue\n"
        f"with Queue(Path({str(project.folder.queue_db)!r})) as queue:\n"
        "    session = queue.start_session(device='cpu', now=1.0, alive_seconds=60.0)\n"  # the clock is far behind
        "    queue.end_session(session, reason='done', now=2.0)\n"
    )
    quick.chmod(0o755)
    with Queue(project.folder.queue_db) as queue:
        earlier = queue.start_session(device="cpu", now=0.0, alive_seconds=60.0)
        queue.end_session(earlier, reason="done", now=0.0)
        monkeypatch.setattr(sys, "executable", str(quick))
        started = project.work_in_background()
        (session,) = {row.id for row in queue.sessions()} - {earlier}
    assert started.sessions == (session,)


def test_stopping_continues_past_sessions_that_just_died_or_are_another_users(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "import sys; queue = open(sys.argv[1]); input()", str(project.folder.queue_db)]
    died, anothers, ours = (subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3))
    identities = [background.identity_of(process.pid) for process in (died, anothers, ours)]
    until(lambda: all(has_open(identity, project.folder.queue_db) for identity in identities))
    with Queue(project.folder.queue_db) as queue:
        for process in (died, anothers, ours):
            identity = background.identity_of(process.pid)
            queue.start_session(device="cpu", now=1.0, alive_seconds=60.0, identity=identity)
    really_kill = os.kill

    def kill(pid: int, number: int) -> None:
        if number == signal.SIGTERM and pid == died.pid:
            really_kill(pid, signal.SIGKILL)
            died.wait()
        if number == signal.SIGTERM and pid == anothers.pid:
            raise PermissionError
        really_kill(pid, number)

    monkeypatch.setattr(os, "kill", kill)
    try:
        stopped = {one.pid: (one.reason is None, one.is_refused) for one in project.stop()}
        assert stopped == {died.pid: (False, False), anothers.pid: (True, True), ours.pid: (False, False)}
        assert ours.wait() == -signal.SIGTERM
        assert anothers.poll() is None
        with pytest.raises(SystemExit) as ended:
            main(["--project", str(project.folder.root), "stop"])
        assert ended.value.code == 1
        assert f"process {anothers.pid} belongs to another user" in capsys.readouterr().out
    finally:
        for process in (died, anothers, ours):
            process.kill()
            process.communicate()


def test_a_mistake_in_the_arguments_starts_nothing(project: Project) -> None:
    with pytest.raises(UsageError, match="1h50m"):
        project.work_in_background(session="2")
    with pytest.raises(UsageError, match="mbqueue work --background"):
        list(project.log())


def test_a_later_process_with_the_recorded_pid_is_left_alone(project: Project) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        identity = background.identity_of(other.pid)
        assert identity.pid_started is not None
        earlier = background.ProcessIdentity(identity.host, identity.boot_id, identity.pid, identity.pid_started - 1)
        background._write(
            project.folder,
            background.BackgroundSession(
                process=earlier, log=project.folder.logs_dir / "x", sessions=(), started_at=0.0
            ),
        )
        assert project.stop() == []
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0

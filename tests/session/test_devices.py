"""Several sessions that one command starts give the same results, exit code and output as a single session."""

from __future__ import annotations

import errno
import io
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE_SECONDS, outcome, run, start_in_background, until, warm
from small_project import RememberedReport, enqueue, make_project, small_spec

from mbqueue.api import Project
from mbqueue.cli import main
from mbqueue.errors import SessionError, UsageError
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue
from mbqueue.session.devices import DevicesOutcome, parse_devices
from mbqueue.session.messages import JsonLines, read_message, retell
from mbqueue.session.outcome import Ending, SessionOutcome, StopCause, StopKind
from mbqueue.session.report import Report
from mbqueue.session.stop import StopRequest


def test_two_sessions_at_once_give_the_same_bytes_as_one(tmp_path: Path) -> None:
    alone = make_project(tmp_path / "alone", checkpoint_minutes=60.0)
    straight = enqueue(alone, small_spec(alone, folds=[0, 1]))
    assert run(alone.root, "work", "--device", "cpu", "--session", "none").returncode == 0

    project = make_project(tmp_path / "two", checkpoint_minutes=60.0)
    folder = enqueue(project, small_spec(project, folds=[0, 1]))
    said, notes = tmp_path / "said", tmp_path / "notes"
    arguments = ("work", "--devices", "cpu,cpu", "--session", "none")
    # The sessions check for jobs often, so the second session finds its fold before the first has finished the other.
    assert warm().run(project.root, arguments, log=said, errors=notes) == 0, notes.read_text()
    assert [outcome(folder, fold) for fold in (0, 1)] == [outcome(straight, fold) for fold in (0, 1)]
    with Queue(project.queue_db, read_only=True) as queue:
        trained = {event.fold: event.by for event in queue.events() if event.kind == "train"}
        assert set(trained.values()) == {session.id for session in queue.sessions()}
        assert len(queue.sessions()) == 2
    assert "[cpu/1] session" in notes.read_text()
    assert "[cpu/2] full_finetune fold" in notes.read_text()
    assert said.read_text().count("nothing is left to do") == 2


def test_a_dead_session_is_reported_and_the_others_continue_until_they_are_stopped(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project", checkpoint_minutes=60.0, lease_seconds=3600.0)
    enqueue(folder, small_spec(folder, folds=[0, 1], train__epochs=1000))
    project = Project(folder.root)
    started = start_in_background(folder, "--devices", "cpu,cpu")
    try:
        until(lambda: len(at_work(folder)) == 2)
        with Queue(folder.queue_db, read_only=True) as queue:
            first, second = queue.sessions()
            assert {first.id, second.id} == set(started.sessions)
            os.kill(first.pid, signal.SIGKILL)
            # mbqueue records that the killed session has ended, and releases its job before the one-hour lease expires.
            until(lambda: queue.session(first.id).end_reason == f"process {first.pid} is gone")
            assert queue.session(second.id).ended_at is None
    finally:
        stopped = project.stop()
    assert [(one.session, one.reason) for one in stopped] == [(second.id, "SIGTERM")]
    assert not started.is_running
    said = "".join(project.log(follow=True))
    assert "its process was terminated by SIGKILL; the other sessions continue" in said
    assert f"session {second.id}: " in said
    with Queue(folder.queue_db, read_only=True) as queue:
        assert not queue.jobs(state=State.LEASED)
        assert not any(job.failures for job in queue.jobs())


def test_a_session_without_a_listener_is_asked_to_stop_once() -> None:
    reading, writing = os.pipe()
    asked: list[str] = []
    with open(writing, "wb", buffering=0) as stream:  # noqa: PTH123 - a descriptor
        lines = JsonLines(stream, on_gone=lambda: asked.append("stop"))
        lines.note("heard")
        os.close(reading)
        lines.note("not heard")
        lines.note("not even written")
    assert asked == ["stop"]


def test_messages_through_a_pipe_arrive_unchanged(project: ProjectFolder) -> None:
    enqueue(project, small_spec(project))
    with Queue(project.queue_db) as queue:
        (job, *_) = queue.jobs()
    lines, direct, retold = io.BytesIO(), RememberedReport(), RememberedReport()
    ended = SessionOutcome(session="s", ending=Ending.BLOCKED, cause=StopCause(StopKind.LIMIT, "r"), jobs_done=3)
    for report in (JsonLines(lines, on_gone=lambda: None), direct):
        report.session_started("s", "d", None)
        report.job_started(job)
        report.advanced(job, "step", 1, 2, {"loss": math.nan})
        report.epoch_finished(job, {"epoch": 1, "val_mae": 0.1}, is_best=True)
        report.job_finished(job, "done")
        report.waiting("why")
        report.note("text")
        if isinstance(report, JsonLines):
            report.job_failed(job, OSError(errno.ENOSPC, "full"), 5.0)
            report.session_ended(ended)
    messages = [read_message(line) for line in lines.getvalue().splitlines()]
    outcomes = [retell(message, retold) for message in messages if message is not None]
    assert outcomes == [None] * 8 + [ended]
    assert retold.lines[:-1] == direct.lines
    assert retold.lines[-1].startswith(
        f"{job.label}: failed: OSError: [Errno {errno.ENOSPC}] full\n  The disk is full."
    )
    assert read_message(b"anything else") is None


def at_work(project: ProjectFolder) -> set[int]:
    """The folds with a committed epoch."""
    with Queue(project.queue_db, read_only=True) as queue:
        return {job.fold for job in queue.jobs(state=State.COMMITTED) if job.fold is not None}


# -- with stand-ins for the sessions' processes ---

STARTED = '{"event": "session_started", "session": "s", "device": "d", "seconds": null}'
ENDED = (
    '{"event": "session_ended", "session": "s", "ending": "%s", "reason": "r", "jobs_done": 2, '
    '"cause": {"kind": "asked", "signal": null}}'
)

Together = Callable[..., DevicesOutcome]


@pytest.fixture
def together(project: ProjectFolder, report: RememberedReport, monkeypatch: pytest.MonkeyPatch) -> Together:
    """A function that runs sessions on several devices, with a shell script in place of each session."""
    with Queue(project.queue_db):
        pass

    def run_scripts(
        script: str,
        devices: str = "0,1",
        stop: StopRequest | None = None,
        report_for: Callable[[str], Report] = lambda _label: report,
    ) -> DevicesOutcome:
        shell = project.root / "sessions.sh"
        shell.write_text(
            f"#!/bin/sh\nSTARTED='{STARTED}'\n"
            + "".join(f"{name}='{ENDED % name}'\n" for name in ("DONE", "STOPPED", "BLOCKED"))
            + textwrap.dedent(script)
        )
        shell.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(shell))
        return Project(project.root).work_on_devices(devices.split(","), report_for=report_for, stop=stop)

    return run_scripts


def test_each_session_sees_its_own_gpu(together: Together, report: RememberedReport, project: ProjectFolder) -> None:
    together(
        'echo "$CUDA_VISIBLE_DEVICES: $*" >> gpus; cd /; echo $STARTED; echo $DONE'.replace(
            "gpus", str(project.root / "gpus")
        ),
        "0,cuda:2",
    )
    seen = sorted((project.root / "gpus").read_text().splitlines())
    assert [line.partition(":")[0] for line in seen] == ["0", "2"]
    assert all("--device cuda" in line and "--no-end-command" in line for line in seen)


@pytest.mark.parametrize(
    ("endings", "together_it_is"),
    [
        (("DONE", "DONE"), Ending.DONE),
        (("STOPPED", "DONE"), Ending.DONE),
        (("STOPPED", "STOPPED"), Ending.STOPPED),
        (("STOPPED", "BLOCKED"), Ending.BLOCKED),
    ],
)
def test_the_ending_is_stopped_unless_a_session_finished_the_work(
    together: Together, endings: tuple[str, str], together_it_is: Ending
) -> None:
    outcome = together(
        f"echo $STARTED; [ $CUDA_VISIBLE_DEVICES = 0 ] && echo ${endings[0]} || echo ${endings[1]}; exit 75"
    )
    assert (outcome.ending, outcome.jobs_done, outcome.failures) == (together_it_is, 4, ())


def test_a_session_that_cannot_start_is_a_failure_with_its_last_lines(
    together: Together, report: RememberedReport
) -> None:
    outcome = together(
        '[ $CUDA_VISIBLE_DEVICES = 0 ] || { echo "error: no GPU 1" >&2; exit 2; }; echo $STARTED; echo $DONE'
    )
    (failure,) = outcome.failures
    assert (failure.device, failure.code, failure.said) == ("cuda:1", 2, "error: no GPU 1")
    assert outcome.ending is Ending.DONE
    assert "note: error: no GPU 1" in report.lines


class EndReport(Report):
    """How sessions ended."""

    def __init__(self) -> None:
        self.ends: list[SessionOutcome | Exception] = []

    def session_ended(self, outcome: SessionOutcome | Exception) -> None:
        self.ends.append(outcome)


def test_each_report_receives_the_end_of_its_session_unless_a_signal_killed_the_session(together: Together) -> None:
    reports = {f"cuda:{number}": EndReport() for number in range(3)}
    outcome = together(
        """
        echo $STARTED
        case $CUDA_VISIBLE_DEVICES in
            0) echo $DONE;;
            1) echo "error: no GPU 1" >&2; exit 2;;
            2) kill -KILL $$;;
        esac
        """,
        "0,1,2",
        report_for=reports.__getitem__,
    )
    assert reports["cuda:0"].ends == list(outcome.sessions) != []
    (error,) = reports["cuda:1"].ends
    assert isinstance(error, SessionError)
    assert str(error) == "The session on cuda:1 exited with code 2.\nerror: no GPU 1"
    assert reports["cuda:2"].ends == []
    assert sorted(failure.code for failure in outcome.failures) == [-signal.SIGKILL, 2]


def test_a_forwarded_signal_that_kills_a_session_before_its_start_is_no_failure(
    together: Together, tmp_path: Path
) -> None:
    stop, up = StopRequest(), tmp_path / "up"

    def stop_once_up() -> None:
        until(lambda: up.exists() and len(up.read_text().split()) == 2)
        stop.request(StopCause.by_signal(signal.SIGUSR2))

    threading.Thread(target=stop_once_up).start()
    outcome = together(
        f"""
        [ $CUDA_VISIBLE_DEVICES = 0 ] && echo 0 >> {up} && exec sleep 60
        trap 'echo $STOPPED; exit 75' USR2
        echo $STARTED
        echo 1 >> {up}
        while true; do sleep 0.05; done
        """,
        stop=stop,
    )
    assert (outcome.ending, len(outcome.sessions), outcome.failures) == (Ending.STOPPED, 1, ())


def test_the_end_command_runs_once_when_all_have_ended(together: Together, project: ProjectFolder) -> None:
    (project.root / "mbqueue.toml").write_text(f'end_command = "cp {project.root}/marks {project.root}/seen"\n')
    together(f"echo $STARTED; [ $CUDA_VISIBLE_DEVICES = 0 ] || sleep 0.3; echo x >> {project.root}/marks; echo $DONE")
    assert (project.root / "seen").read_text() == "x\nx\n"


def test_a_second_ctrl_c_ends_all_sessions_immediately(project: ProjectFolder, tmp_path: Path) -> None:
    enqueue(project, small_spec(project))
    stubborn = tmp_path / "python"
    stubborn.write_text(
        f"#!/bin/sh\ntrap 'echo >> {tmp_path}/ignored' INT\necho $$ >> {tmp_path}/pids\necho '{STARTED}'\n"
        "while true; do sleep 0.05; done\n"
    )
    stubborn.chmod(0o755)
    code = (
        "import sys; from mbqueue.api import Project; sys.executable = sys.argv[2]; "
        "Project(sys.argv[1]).work_on_devices(['cpu', 'cpu'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(project.root), str(stubborn)])
    pids = tmp_path / "pids"
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2, process)
    process.send_signal(signal.SIGINT)
    ignored = tmp_path / "ignored"
    until(lambda: ignored.exists() and len(ignored.read_text()) == 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE_SECONDS) == 130
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()))


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = parse_devices(["0", "cuda:1", " cpu", "cpu", "GPU-1a2b"])
    assert [(device.label, device.name, device.visible) for device in devices] == [
        ("cuda:0", "cuda", "0"),
        ("cuda:1", "cuda", "1"),
        ("cpu/1", "cpu", None),
        ("cpu/2", "cpu", None),
        ("GPU-1a2b", "cuda", "GPU-1a2b"),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [device.visible for device in parse_devices(["1", "0"])] == ["GPU-5", "3"]
    with pytest.raises(UsageError, match="counts the GPUs in this list from 0"):
        parse_devices(["2"])
    for wrong in ([""], ["gpu1"], ["cuda"], ["-1"]):
        with pytest.raises(UsageError, match="cpu,cpu"):
            parse_devices(wrong)


def test_options_that_exclude_each_other_are_refused(project: ProjectFolder) -> None:
    enqueue(project, small_spec(project))
    for arguments in (
        ["--devices", "cpu", "--device", "cpu"],
        ["--devices", "cpu", "--json"],
        ["--background", "--json"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--project", str(project.root), "work", *arguments])
        assert ended.value.code == 2


def test_on_a_terminal_every_session_has_a_moving_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mbqueue.cli.progress import Screen

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    with Screen() as screen:
        for label in ("cuda:0", "cuda:1"):
            screen.report(label).waiting("for a very long time, so that the line is longer than the screen")
    said = capsys.readouterr().err
    assert "cuda:0  waiting: for a very" in said
    assert "cuda:1  waiting: for a very" in said
    assert "longer than the screen" not in said

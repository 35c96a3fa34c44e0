"""A hook that fails or hangs leaves a note and does not affect the session."""

from __future__ import annotations

import time
from pathlib import Path

from small_project import RememberedReport, make_project, small_spec
from small_project import enqueue as put

from mbqueue.session.ending import run_end_command
from mbqueue.session.notify import Notifier
from mbqueue.session.outcome import Ending, SessionOutcome, StopCause, StopKind
from mbqueue.settings import NotifySettings, Settings


def send(settings: NotifySettings, reason: str = "done") -> list[str]:
    """Send one notification; return the error messages about it."""
    notes: list[str] = []
    with Notifier(settings, project="p", on_trouble=notes.append) as notifier:
        cause = StopCause(StopKind.ASKED, reason)
        notifier.session_ended(SessionOutcome(session="s", ending=Ending.STOPPED, cause=cause, jobs_done=1))
    return notes


def test_a_command_that_works_leaves_no_note(tmp_path: Path) -> None:
    assert send(NotifySettings(command=f"echo $MBQUEUE_TEXT > {tmp_path}/told"), "time is up") == []
    assert "time is up" in (tmp_path / "told").read_text()


def test_a_failed_command_is_noted_with_its_last_line() -> None:
    (note,) = send(NotifySettings(command="echo no route >&2; exit 3"))
    assert "code 3: no route" in note


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    (note,) = send(NotifySettings(command=f"(sleep 60; touch {tmp_path}/late) & sleep 60", timeout_seconds=0.2))
    assert "longer than 0.2 s" in note
    assert time.monotonic() - began < 30


def test_a_daemon_that_keeps_the_commands_standard_error_is_not_waited_for() -> None:
    began = time.monotonic()
    (note,) = send(NotifySettings(command="setsid sleep 20 & true", timeout_seconds=0.2))
    assert "longer than 0.2 s" in note
    assert time.monotonic() - began < 15


def test_a_web_hook_without_a_listener_is_noted_without_its_secret_path() -> None:
    (note,) = send(NotifySettings(webhook="http://127.0.0.1:9/secret-token"))
    assert "notify.webhook" in note
    assert "secret-token" not in note


def test_messages_about_a_failed_hook_or_end_command_do_not_repeat_it() -> None:
    (note,) = send(NotifySettings(command="exit 3; curl https://host/secret-token"))
    assert "notify.command" in note
    command = "echo no answer from https://host/services/T0123/s3cr3t-t0k3n >&2; exit 3"
    (said,) = send(NotifySettings(command=command))
    assert "code 3: no answer from https://host" in said
    assert "s3cr3t-t0k3n" not in said
    for unreadable in ("http://me:secret-token@127.0.0.1", "http://127.0.0.1/\x7fsecret-token", "http://[secret-token"):
        (unsent,) = send(NotifySettings(webhook=unreadable))
        assert "notify.webhook" in unsent
        assert "secret-token" not in unsent
    notes: list[str] = []
    assert not run_end_command("exit 3 # secret-token", timeout_seconds=30, note=notes.append)
    assert not run_end_command("exec sleep 600 # secret-token", timeout_seconds=0.2, note=notes.append)
    assert len(notes) == 2
    assert all("end_command" in said for said in notes)
    assert "secret-token" not in f"{note} {' '.join(notes)}"


def test_settings_that_may_hold_a_secret_do_not_show_it() -> None:
    settings = Settings(
        queue="postgresql://me:secret@host/db",
        end_command="sync # secret",
        notify=NotifySettings(command="curl secret", webhook="https://host/secret"),
    )
    assert "secret" not in repr(settings)


def test_only_the_chosen_events_are_sent(tmp_path: Path) -> None:
    send(NotifySettings(command=f"touch {tmp_path}/told", events=("job failed",)))
    assert not (tmp_path / "told").exists()
    send(NotifySettings(command=f"touch {tmp_path}/told", events=("job failed", "session ended")))
    assert (tmp_path / "told").exists()


def test_a_failing_hook_does_not_affect_the_session_and_a_failed_job_is_notified(tmp_path: Path) -> None:
    from mbqueue.api import Project

    project = make_project(tmp_path / "project")
    (tmp_path / "broken.jsonl").write_text('{"id": "a"}\n')
    (project.root / "mbqueue.toml").write_text(f"[notify]\ncommand = 'echo $MBQUEUE_TEXT >> {tmp_path}/told; exit 1'\n")
    put(project, small_spec(project, "head_finetune", data__dataset=str(tmp_path / "broken.jsonl")))
    report = RememberedReport()
    outcome = Project(project.root).work(device="cpu", report=report)
    assert outcome.jobs_done == 0
    told = (tmp_path / "told").read_text().splitlines()
    assert ("head_finetune prepare failed" in told[0], "session" in told[-1]) == (True, True)
    assert sum("notify.command could not send" in line for line in report.lines) == 2

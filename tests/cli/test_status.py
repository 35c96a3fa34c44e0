"""The output of `status` for one experiment and of `status --watch`, and the options that `status` refuses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from mbqueue import Project
from mbqueue.cli import status
from mbqueue.project import ProjectFolder
from mbqueue.queue.opening import open_queue

Command = Callable[..., Any]

SEARCH = '[search]\nbase = "full_finetune"\ntrials = 2\n[search.space]\n"train.lr" = { choices = [1e-2, 1e-3] }\n'


def looks(monkeypatch: pytest.MonkeyPatch, *between: Callable[[], object]) -> None:
    """Replace each wait of --watch with one of the given calls, and the wait after the last call with an interrupt."""
    left = iter(between)

    def wait(_seconds: float) -> None:
        call = next(left, None)
        if call is None:
            raise KeyboardInterrupt
        call()

    monkeypatch.setattr(status.time, "sleep", wait)


def fail_next_job(project: ProjectFolder, message: str) -> None:
    now = time.time()
    with open_queue(project) as queue:
        session = queue.start_session(device="cpu", now=now, alive_seconds=60)
        lease = queue.claim(session, now=now, lease_seconds=60)
        assert lease is not None
        queue.fail(lease, error=f"Traceback\nValueError: {message}", now=now, final=True)
        queue.end_session(session, reason="a job has failed", now=now)


def test_the_command_at_the_end_of_a_cut_error_shows_the_error_in_full(
    mbqueue: Command, project: ProjectFolder
) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    message = " ".join(f"word{number}" for number in range(200))
    fail_next_job(project, message)
    assert "(in full: mbqueue status full_finetune)" in mbqueue("status").out
    assert message in " ".join(mbqueue("status", "full_finetune").out.split())
    told = mbqueue("events", "full_finetune").out
    assert " …  [" in told, "an event contains only the beginning of a long message"


def test_the_status_of_a_search_counts_only_its_own_jobs_and_errors(mbqueue: Command, project: ProjectFolder) -> None:
    (project.jobs_dir / "rates.toml").write_text(SEARCH)
    mbqueue("enqueue", "head_finetune", "--dataset", "sample")
    fail_next_job(project, "of another experiment")
    mbqueue("enqueue", "rates")
    jobs = Project(project.root).status("rates.000").overview["jobs"]
    overview = Project(project.root).status("rates").overview
    assert overview["jobs"] == jobs
    assert overview["errors"] == []
    assert "of another experiment" not in mbqueue("status", "rates").out
    assert "of another experiment" in mbqueue("status").out


@pytest.mark.parametrize("name", ["rates", "rates.000"])
def test_the_errors_of_a_search_are_shown_even_if_others_have_many_newer_errors(
    mbqueue: Command, project: ProjectFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("mbqueue.queue.overview._ERRORS_SHOWN", 1)
    (project.jobs_dir / "rates.toml").write_text(SEARCH)
    mbqueue("enqueue", "rates")
    fail_next_job(project, "of the trial")
    mbqueue("enqueue", "head_finetune", "--dataset", "sample")
    fail_next_job(project, "of another experiment")
    assert [error["experiment"] for error in Project(project.root).status().overview["errors"]] == ["head_finetune"]
    assert "of the trial" in mbqueue("status", name).out


@pytest.mark.parametrize("has_failed", [True, False])
def test_the_status_of_an_ended_experiment_does_not_hide_that_others_have_work(
    mbqueue: Command, project: ProjectFolder, *, has_failed: bool
) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    if has_failed:
        fail_next_job(project, "of the first")
    else:
        Project(project.root).cancel("full_finetune")
    alone = "jobs failed" if has_failed else "no job is left to run"
    assert alone in mbqueue("status", "full_finetune").out
    mbqueue("enqueue", "head_finetune", "--dataset", "sample")
    said = mbqueue("status", "full_finetune").out
    assert "No session is running. Start one with: mbqueue work" in said
    assert "head_finetune" not in said
    mbqueue("pause", "head_finetune")
    assert "mbqueue resume head_finetune" in mbqueue("status", "full_finetune").out


def test_watching_in_a_pipe_prints_the_view_again_when_something_is_new(
    mbqueue: Command, monkeypatch: pytest.MonkeyPatch, project: ProjectFolder
) -> None:
    mbqueue("enqueue", "full_finetune", "--dataset", "sample")
    looks(monkeypatch, lambda: None, lambda: Project(project.root).cancel("full_finetune", fold=4), lambda: None)
    said = mbqueue("status", "--watch").out
    assert said.count("full_finetune  ready") == 2
    assert said.count("cancelled\n") == 1
    assert "\x1b" not in said


def test_watching_as_json_is_refused(mbqueue: Command) -> None:
    said = mbqueue("status", "--watch", "--json")
    assert said.code == 2
    assert "--json prints the state only once and cannot be combined with --watch" in said.err

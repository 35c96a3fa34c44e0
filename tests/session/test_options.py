"""A session that another process starts gets that process's options."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_project import make_project

from mbqueue import Project
from mbqueue.cli import main
from mbqueue.session import worker
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending, SessionOutcome, StopCause, StopKind


@pytest.fixture
def given(monkeypatch):
    """Replace sessions with a function that only records their options; return the list of recorded options."""
    options: list[WorkOptions] = []

    def work(_project, got, **_others):
        options.append(got)
        return SessionOutcome(session="s", ending=Ending.DONE, cause=StopCause(StopKind.EXHAUSTED, "r"), jobs_done=0)

    monkeypatch.setattr(worker, "work", work)
    return options


@pytest.mark.parametrize(
    "options",
    [
        WorkOptions(),
        WorkOptions(session_seconds=6600.5, max_jobs=3, idle_seconds=0.25, device="cuda:1", end_command=False),
        WorkOptions(forever=True),
    ],
)
def test_a_child_process_gets_the_options_that_its_command_line_was_made_of(tmp_path, given, options):
    with pytest.raises(SystemExit):
        main(["--project", str(make_project(tmp_path).root), "work", *options.arguments()])
    (got,) = given
    if options.session_seconds is not None:
        # The session's length excludes the time that the process took to start.
        assert got.session_seconds is not None
        assert options.session_seconds - 60 < got.session_seconds <= options.session_seconds
    assert replace(got, session_seconds=None) == replace(options, session_seconds=None)


def test_the_arguments_of_a_python_program_become_the_options(tmp_path, given):
    project = Project(make_project(tmp_path).root)
    project.work(session="none", max_jobs=3, max_idle="10m", device="cuda:1", end_command=False)
    project.work(forever=True)
    assert given == [
        WorkOptions(max_jobs=3, idle_seconds=600.0, device="cuda:1", end_command=False),
        WorkOptions(forever=True),
    ]
    project.work()
    assert given[-1].session_seconds == pytest.approx(project.folder.settings.session_seconds, abs=60)


@pytest.mark.parametrize("wrong", [{"devices": ["cpu"]}, {"sesion": "1h"}, {"session_seconds": 5.0}])
def test_an_unknown_argument_is_refused(tmp_path, given, wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        Project(make_project(tmp_path).root).work(**wrong)
    assert given == []

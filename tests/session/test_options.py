"""A session that another process starts gets that process's options."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_project import make_project

from mbqueue.cli import main
from mbqueue.session import worker
from mbqueue.session.options import WorkOptions
from mbqueue.session.outcome import Ending, SessionOutcome, StopCause, StopKind


@pytest.mark.parametrize(
    "options",
    [
        WorkOptions(),
        WorkOptions(session_seconds=6600.5, max_jobs=3, idle_seconds=0.25, device="cuda:1", end_command=False),
        WorkOptions(forever=True),
    ],
)
def test_a_child_process_gets_the_options_that_its_command_line_was_made_of(tmp_path, monkeypatch, options):
    given: list[WorkOptions] = []

    def work(_project, got, **_others):
        given.append(got)
        return SessionOutcome(session="s", ending=Ending.DONE, cause=StopCause(StopKind.EXHAUSTED, "r"), jobs_done=0)

    monkeypatch.setattr(worker, "work", work)
    with pytest.raises(SystemExit):
        main(["--project", str(make_project(tmp_path).root), "work", *options.arguments()])
    (got,) = given
    if options.session_seconds is not None:
        # The deadline excludes the time that starting took.
        assert got.session_seconds is not None
        assert options.session_seconds - 60 < got.session_seconds <= options.session_seconds
    assert replace(got, session_seconds=None) == replace(options, session_seconds=None)

"""The output of `status --watch` without a terminal, and the options that `status` refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mbqueue import Project
from mbqueue.cli import status
from mbqueue.project import ProjectFolder

Command = Callable[..., Any]


def looks(monkeypatch: pytest.MonkeyPatch, *between: Callable[[], object]) -> None:
    """Replace each wait of --watch with one of the given calls, and the wait after the last call with an interrupt."""
    left = iter(between)

    def wait(_seconds: float) -> None:
        call = next(left, None)
        if call is None:
            raise KeyboardInterrupt
        call()

    monkeypatch.setattr(status.time, "sleep", wait)


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

"""Run commands in this process, and keep exit code, standard output and standard error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from mbqueue.cli import main
from mbqueue.project import ENVIRONMENT_VARIABLE, ProjectFolder


@dataclass(frozen=True)
class Said:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def mbqueue(project: ProjectFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in a fresh project."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Said:
        with pytest.raises(SystemExit) as ended:
            main(["--project", str(project.root), *arguments])
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run

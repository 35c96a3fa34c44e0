"""The current project, and the options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mbqueue.api import Project
from mbqueue.errors import UsageError
from mbqueue.project import ProjectFolder, find_project

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
IdColumnOption = Annotated[str, typer.Option("--id-column", metavar="NAME", help="Column of a table with the ids.")]
TargetColumnOption = Annotated[
    str, typer.Option("--target-column", metavar="NAME", help="Column of a table with the targets.")
]
ExperimentArgument = Annotated[str, typer.Argument(help="Name of an enqueued experiment.")]
SearchArgument = Annotated[str, typer.Argument(metavar="SEARCH", help="A search in the queue.")]

#: The maximum number of folds or seeds in one command: a larger number is a typing error.
_MOST_NUMBERS = 100


def current_project(context: typer.Context) -> ProjectFolder:
    """The project that the user named, or that the command runs in."""
    given: str | Path | None = context.find_root().params.get("project")  # typer before 0.29 leaves the option as text
    return find_project(None if given is None else Path(given))


def open_project(context: typer.Context, *, while_away: bool = False) -> Project:
    """The current project as an object of the Python API."""
    return Project(context.find_root().params.get("project"), while_away=while_away)


def parse_folds(text: str) -> tuple[int, ...]:
    """Fold numbers from ``0,2,4`` or ``0-2``.

    Raises:
        UsageError: for anything else. The spec checks whether the numbers are valid folds.
    """
    return _numbers(text, "folds", digits=2)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from ``0,2,5`` or ``0-4``.

    Raises:
        UsageError: for anything else, and for more than 100.
    """
    return _numbers(text, "seeds", digits=10)


def _numbers(text: str, what: str, *, digits: int) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(rf"([0-9]{{1,{digits}}})(?:\s*-\s*([0-9]{{1,{digits}}}))?", part.strip())
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not numbers:
            raise UsageError(f"{text!r} does not name {what}. Write them like 0,1,2 or 0-2.")
        if len(found) + len(numbers) > _MOST_NUMBERS:
            raise UsageError(f"{text!r} names more than {_MOST_NUMBERS} {what}. Give fewer.")
        found.extend(numbers)
    return tuple(found)

"""Options that several commands share, and functions that open the current project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mbqueue.api import Project
from mbqueue.errors import UsageError
from mbqueue.project import ProjectFolder, find_project

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
IdColumnOption = Annotated[
    str, typer.Option("--id-column", metavar="NAME", help="Name of the id column in your table.")
]
TargetColumnOption = Annotated[
    str, typer.Option("--target-column", metavar="NAME", help="Name of the target column in your table.")
]
DropInvalidOption = Annotated[
    bool, typer.Option("--drop-invalid", help="Leave out entries that cannot be used, and list them.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1; by default the first GPU or, without a GPU, the CPU.")
]
ExperimentArgument = Annotated[str, typer.Argument(help="Name of an enqueued experiment.")]
SearchArgument = Annotated[str, typer.Argument(metavar="SEARCH", help="Name of an enqueued search.")]

#: The maximum number of folds or seeds in one command; more are probably a typo.
_MOST_NUMBERS = 100


def current_project(context: typer.Context) -> ProjectFolder:
    """Find the project of this command: the one given with --project, else that of the working directory."""
    given: str | Path | None = context.find_root().params.get("project")  # typer before 0.29 returns text
    return find_project(None if given is None else Path(given))


def open_project(context: typer.Context, *, while_away: bool = False) -> Project:
    return Project(context.find_root().params.get("project"), while_away=while_away)


def parse_folds(text: str) -> tuple[int, ...]:
    """Parse fold numbers such as ``0,2,4`` or ``0-2``, without checking that the folds exist.

    Raises:
        UsageError: if the text is not a list of fold numbers.
    """
    return _numbers(text, "folds", digits=2)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Parse seeds such as ``0,2,5`` or ``0-4``.

    Raises:
        UsageError: if the text is not a list of seeds, or contains more than 100.
    """
    return _numbers(text, "seeds", digits=10)


def _numbers(text: str, what: str, *, digits: int) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(rf"([0-9]{{1,{digits}}})(?:\s*-\s*([0-9]{{1,{digits}}}))?", part.strip())
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not numbers:
            raise UsageError(f"{text!r} is not a list of {what}. Write, for example, 0,1,2 or 0-2.")
        if len(found) + len(numbers) > _MOST_NUMBERS:
            raise UsageError(f"{text!r} has more than {_MOST_NUMBERS} {what}. Give fewer.")
        found.extend(numbers)
    return tuple(found)

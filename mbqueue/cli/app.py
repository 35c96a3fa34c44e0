"""The list of commands. Each is one function in a module of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mbqueue
from mbqueue.cli.console import print_line
from mbqueue.project import LIVE_VARIABLE

#: Command → its module in this package, in the order of `mbqueue --help`.
_MODULES = {
    "init": "setup",
    "prepare": "datasets",
    "enqueue": "queueing",
    "work": "work",
    "logs": "work",
    "stop": "work",
    "status": "status",
    "events": "queueing",
    "predict": "predicting",
    "report": "reading",
    "compare": "reading",
    "export": "reading",
    "pause": "queueing",
    "resume": "queueing",
    "cancel": "queueing",
    "retry": "queueing",
    "priority": "queueing",
    "recover": "keeping",
    "backup": "keeping",
    "restore": "keeping",
    "cache": "datasets",
    "demo": "demo",
    "doctor": "doctor",
}


class _Commands(Mapping[str, Any]):
    """Makes a command when it is asked for, so that `status` waits neither for the imports of others nor their help."""

    def __getitem__(self, name: str) -> Any:
        found = getattr(import_module(f"mbqueue.cli.{_MODULES[name]}"), name)
        if not isinstance(found, typer.Typer):
            function, found = found, typer.Typer(add_completion=False, rich_markup_mode=None)
            found.command(name)(function)
        return typer.main.get_command(found)

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


class _Group(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()  # type: ignore[assignment]  # nobody adds to it


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run very long CHGNet trainings on short GPU sessions.\n\n"
    "First success: mbqueue demo. Your own: mbqueue init, mbqueue enqueue, mbqueue work, mbqueue status.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"mbqueue {mbqueue.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    project: Annotated[
        Path | None,
        typer.Option(help="Project folder; otherwise $MBQUEUE_PROJECT, otherwise the nearest parent that is one."),
    ] = None,
    live_dir: Annotated[
        Path | None,
        typer.Option(
            help="Local folder for the live state; otherwise $MBQUEUE_LIVE_DIR, otherwise state/, and for a project on "
            "a drive a folder below ~/.cache."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del project, debug, version  # read where they are needed: see options.current_project and cli.main
    if live_dir is not None:
        os.environ[LIVE_VARIABLE] = str(live_dir.absolute())  # so that a session in the background gets it too

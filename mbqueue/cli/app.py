"""The list of commands. Each is one function in a module of this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import mbqueue
from mbqueue.cli import datasets, demo, doctor, keeping, predicting, queueing, reading, setup, status, work
from mbqueue.cli.console import print_line
from mbqueue.project import LIVE_VARIABLE

app = typer.Typer(
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


for command in (
    setup.init,
    datasets.prepare,
    queueing.enqueue,
    work.work,
    work.logs,
    work.stop,
    status.status,
    queueing.events,
    predicting.predict,
    reading.report,
    reading.compare,
    reading.export,
    queueing.pause,
    queueing.resume,
    queueing.cancel,
    queueing.retry,
    queueing.priority,
    keeping.recover,
    keeping.backup,
    keeping.restore,
    demo.demo,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(datasets.cache, name="cache", no_args_is_help=True)

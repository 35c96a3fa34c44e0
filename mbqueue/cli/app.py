"""The list of mbqueue's commands. Each command is a function in a module of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mbqueue import __version__
from mbqueue.cli.console import print_line, say
from mbqueue.errors import ProjectNotFound
from mbqueue.project import ENVIRONMENT_VARIABLE, working_folder
from mbqueue.topology import LIVE_VARIABLE

#: The sections of `mbqueue --help`: for each command, the name of its module in this package and its summary line.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Get started": {
        "demo": ("demo", "Train on the shipped sample, kill the session, and resume."),
        "init": ("setup", "Create a project with five experiments in jobs/."),
        "doctor": ("doctor", "Check this machine, and print how to fix problems."),
    },
    "Queue and train": {
        "enqueue": ("queueing", "Add an experiment or a search to the queue."),
        "promote": ("queueing", "Enqueue the best settings of a search on all folds."),
        "blend": ("blending", "Average the predictions of recorded experiments."),
        "predict-again": ("blending", "Repeat predictions, averaged over small strains."),
        "tasks": ("datasets", "List the matbench tasks that you can train on."),
        "work": ("work", "Run a session: train until all work is done or time is up."),
        "logs": ("work", "Show the log of the background session."),
        "stop": ("work", "Stop the sessions on this machine, saving their work."),
        "prepare": ("datasets", "Convert a dataset ahead of time."),
        "launch": ("launching", "Run sessions as cluster jobs."),
    },
    "Inspect": {
        "status": ("status", "Show experiments, folds, sessions, time left and errors."),
        "board": ("board", "Serve a live, interactive dashboard."),
        "events": ("queueing", "List all changes of job states, with reasons."),
        "report": ("reading", "Write an HTML page with scores, curves, errors and sessions."),
        "compare": ("reading", "Compare experiments crystal by crystal."),
        "export": ("reading", "Write a submission for the matbench leaderboard."),
        "export-study": ("reading", "Export a search as a study for optuna-dashboard."),
        "predict": ("predicting", "Predict the target for your own crystals with trained models."),
    },
    "Control": {
        "pause": ("queueing", "Pause the jobs of an experiment or fold."),
        "resume": ("queueing", "Resume a paused experiment or fold."),
        "cancel": ("queueing", "Cancel the remaining jobs of an experiment or fold."),
        "retry": ("queueing", "Retry failed jobs, and rebuild lost results."),
        "priority": ("queueing", "Set the priority of an experiment or fold."),
    },
    "Maintain": {
        "recover": ("keeping", "Rebuild a lost queue from the checkpoints."),
        "backup": ("keeping", "Write the project's whole state to an archive."),
        "restore": ("keeping", "Restore the project's state from an archive."),
        "migrate-queue": ("keeping", "Move the queue to PostgreSQL, or back to a file."),
        "move-commits": ("keeping", "Move commits to a different store or to the project's folder."),
        "cache": ("datasets", "List, verify or prune converted data."),
    },
}
_MODULES = {name: module for commands in SECTIONS.values() for name, (module, _) in commands.items()}


class _Commands(Mapping[str, Any]):
    """Import each command only when it is needed, so that `status` does not wait for the imports of other commands."""

    def __getitem__(self, name: str) -> Any:
        found = getattr(import_module(f"mbqueue.cli.{_MODULES[name]}"), name.replace("-", "_"))
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
        self.commands = _Commands()  # type: ignore[assignment]  # typer only reads it

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run very long CHGNet training runs on short GPU sessions.\n\n"
    "To try it, run: mbqueue demo. To start your own project, run: mbqueue init DIR. In DIR, run mbqueue enqueue "
    "full_finetune, then repeat mbqueue work until all jobs are done. mbqueue status shows the progress. `mbqueue "
    "COMMAND --help` has examples.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"mbqueue {__version__}")
        raise typer.Exit


def _leave_a_folder_that_is_gone(project: Path | None) -> None:
    """Change to the project's folder if the working directory is gone. Some libraries fail to load without one."""
    try:
        working_folder()
    except ProjectNotFound:
        named = Path(project or os.environ.get(ENVIRONMENT_VARIABLE, "")).expanduser()
        if not named.is_absolute():
            raise
        with suppress(OSError):  # if the project's folder is gone too, a later check reports it
            os.chdir(named)
            say(f"This shell's working directory no longer exists. Relative paths now start from {named}.")


@app.callback()
def _root(
    project: Annotated[
        Path | None,
        typer.Option(
            help="The project's folder. The default is $MBQUEUE_PROJECT or, if it is not set, the nearest project at "
            "or above the current folder."
        ),
    ] = None,
    live_dir: Annotated[
        Path | None,
        typer.Option(
            help="Local folder for the live state. The default is $MBQUEUE_LIVE_DIR or, if it is not set, state/ (for "
            "a project on a drive, a folder in ~/.cache)."
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del debug, version  # `cli.main` and `_print_version` handle these options
    _leave_a_folder_that_is_gone(project)
    if live_dir is not None:
        os.environ[LIVE_VARIABLE] = str(live_dir.absolute())  # background sessions inherit environment variables

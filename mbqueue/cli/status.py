"""The command ``mbqueue status``, which shows experiments, sessions and errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from mbqueue.api import Status
from mbqueue.cli.console import print_json, print_line
from mbqueue.cli.options import JsonOption, open_project
from mbqueue.errors import UsageError

#: Seconds between updates with --watch.
WATCH_SECONDS = 2.0


def status(
    context: typer.Context,
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment.")] = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds until Ctrl-C.")] = False,
) -> None:
    """Show experiments, folds, sessions and errors. With a name, errors are shown in full.

    The format of --json is stable (docs/reference/status-json.md).

    Example: mbqueue status full_finetune --watch
    """
    if as_json and watch:
        raise UsageError(
            "--json prints the state only once and cannot be combined with --watch. Leave out one of them."
        )
    project = open_project(context, while_away=True)
    console = Console()
    if as_json:
        print_json(project.status(experiment).overview)
    elif not watch:
        console.print(project.status(experiment))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(lambda: project.status(experiment), console)


def _watch(look: Callable[[], Status], console: Console) -> None:
    """Keep updating the view in a terminal; elsewhere, print the view again whenever it changes."""
    seen = look()
    if not console.is_terminal:
        console.print(seen)
        while True:
            time.sleep(WATCH_SECONDS)
            found = look()
            if found.says_more_than(seen):
                print_line()
                console.print(found)
                seen = found
    with Live(seen.view(fits_height=True), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(look().view(fits_height=True), refresh=True)

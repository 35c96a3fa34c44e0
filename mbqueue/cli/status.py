"""``mbqueue status``: where everything stands."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from mbqueue.cli.console import print_json
from mbqueue.cli.options import JsonOption, open_project

#: Between two looks of --watch.
WATCH_SECONDS = 2.0


def status(
    context: typer.Context,
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment.")] = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show experiments, folds, sessions and errors. The format of --json is stable (docs/status-json.md).

    Example: mbqueue status full_finetune --watch
    """
    project = open_project(context)
    console = Console()
    if as_json:
        print_json(project.status(experiment).overview)
    elif not watch:
        console.print(project.status(experiment))
    else:
        with Live(project.status(experiment).view(), console=console, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(WATCH_SECONDS)
                    live.update(project.status(experiment).view(), refresh=True)
            except KeyboardInterrupt:
                return

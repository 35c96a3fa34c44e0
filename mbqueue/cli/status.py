"""``mbqueue status``: where everything stands."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from mbqueue.cli.console import print_json
from mbqueue.cli.options import JsonOption, current_project
from mbqueue.clock import SystemClock
from mbqueue.dashboard import render
from mbqueue.queue.store import Queue

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
    project = current_project(context)
    console = Console()
    with Queue(project.queue_db, read_only=True) as queue:
        if experiment is not None:
            queue.experiment(experiment)  # an unknown name is an error that lists the known ones

        def look() -> dict[str, object]:
            return queue.overview(now=SystemClock().now(), project=str(project.root), experiment=experiment)

        def draw() -> RenderableType:
            return render(look(), now=SystemClock().now(), session_seconds=project.settings.session_seconds)

        if as_json:
            print_json(look())
        elif not watch:
            console.print(draw())
        else:
            with Live(draw(), console=console, auto_refresh=False) as live:
                try:
                    while True:
                        time.sleep(WATCH_SECONDS)
                        live.update(draw(), refresh=True)
                except KeyboardInterrupt:
                    return

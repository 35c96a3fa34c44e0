"""Commands that read results: report, compare, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mbqueue.cli.console import print_json, print_line, say
from mbqueue.cli.options import ExperimentArgument, JsonOption, current_project
from mbqueue.clock import SystemClock
from mbqueue.errors import UsageError
from mbqueue.queue.store import Queue


def report(
    context: typer.Context,
    experiment: ExperimentArgument,
    output: Annotated[
        Path | None, typer.Option(help="The HTML file; by default report.html in the results folder.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw each figure as PNG in this folder.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: scores, curves, errors by element and size, worst crystals, sessions.

    Needs the experiment's recorded results; opens in any browser without a network.

    Example: mbqueue report full_finetune --output report.html
    """
    from mbqueue.dashboard.timeline import timeline
    from mbqueue.results.folder import newest_folder, read_recorded
    from mbqueue.results.report.page import REPORT_FILE, write_report

    project = current_project(context)
    recorded = read_recorded(newest_folder(project.results_dir, experiment))
    spans = []
    if project.queue_db.exists():
        with Queue(project.queue_db, read_only=True) as queue:
            sessions = queue.sessions(experiment=recorded.name)
            events = queue.events(experiment=recorded.name, limit=10**6)
        spans = timeline(sessions, events, now=SystemClock().now())
    path = output or recorded.folder / REPORT_FILE
    write_report(recorded, path, timeline=spans)
    print_line(str(path))
    if png is not None:
        from mbqueue.results.report.pictures import write_pictures

        for picture in write_pictures(recorded, png):
            print_line(str(picture))


def compare(
    context: typer.Context,
    experiments: Annotated[
        list[str], typer.Argument(help="Two or more recorded experiments; the first is the reference.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write this HTML page.")] = None,
) -> None:
    """Put experiments side by side, with paired differences per crystal and matbench's leaderboard.

    Example: mbqueue compare full_finetune head_finetune pretrained_infer
    """
    from mbqueue.dashboard.comparison import render_comparison
    from mbqueue.results.compare import compare as compare_recorded
    from mbqueue.results.folder import newest_folder, read_recorded

    if len(experiments) < 2:
        raise UsageError("Give two experiments or more, like: mbqueue compare full_finetune pretrained_infer")
    project = current_project(context)
    comparison = compare_recorded([read_recorded(newest_folder(project.results_dir, name)) for name in experiments])
    Console().print(render_comparison(comparison))
    if html is not None:
        from mbqueue.results.report.comparison import write_comparison

        write_comparison(comparison, html)
        say(f"written: {html}")


def export(
    context: typer.Context,
    experiment: ExperimentArgument,
    output: Annotated[Path, typer.Option(help="Folder in which the submission's folder is made.")] = Path(),
    authors: Annotated[str, typer.Option(help="Names for info.json.")] = "",
    algorithm: Annotated[str, typer.Option(help="Name of the algorithm on the leaderboard.")] = "",
    notes: Annotated[str, typer.Option(help="Free text for info.json.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make the folder that matbench's leaderboard takes; refused with reasons unless all five official folds are there.

    Example: mbqueue export full_finetune --authors "A. Researcher"
    """
    from mbqueue.results.export import export_submission
    from mbqueue.results.folder import newest_folder, read_recorded

    project = current_project(context)
    recorded = read_recorded(newest_folder(project.results_dir, experiment))
    folder = export_submission(recorded, output, authors=authors, algorithm=algorithm, notes=notes)
    files = sorted(str(path) for path in folder.iterdir())
    if as_json:
        print_json(files)
    else:
        for path in files:
            print_line(path)

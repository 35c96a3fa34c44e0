"""Commands that use results: report, compare, export, export-study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mbqueue.cli.console import print_json, print_line, say
from mbqueue.cli.options import ExperimentArgument, JsonOption, SearchArgument, open_project
from mbqueue.errors import UsageError

ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]


def report(
    context: typer.Context,
    experiment: ExperimentArgument,
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write, or its folder; by default the results folder.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write each figure as a PNG file to this folder.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write an HTML page with scores, curves, errors by element and size, the worst crystals, and sessions.

    The experiment may be finished or running. A browser can open the page without an internet connection. The page of
    a search shows the history of the best score, parallel coordinates, the importance of settings and all learning
    curves.

    Example: mbqueue report full_finetune --output report.html
    """
    project = open_project(context)
    if project.is_search(experiment):
        (summary,) = project.status(experiment).overview["searches"]
        if summary["state"] != "done":
            say(f"{experiment} has not finished: the report covers only its results so far.", style="yellow")
    elif not project.results(experiment).is_complete:
        say(f"{experiment} has not finished: the report covers only its results so far.", style="yellow")
    for path in project.report(experiment, output=output, png=png, force=force):
        print_line(str(path))


def compare(
    context: typer.Context,
    experiments: Annotated[
        list[str], typer.Argument(help="Two or more different recorded experiments; the first is the reference.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write the comparison to this HTML file.")] = None,
    force: ForceOption = False,
) -> None:
    """Compare experiments crystal by crystal. For a complete matbench dataset, also show the leaderboard.

    Example: mbqueue compare full_finetune head_finetune pretrained_infer
    """
    from mbqueue.dashboard.comparison import ComparisonView

    if len(experiments) < 2:
        raise UsageError("Give at least two experiments, for example: mbqueue compare full_finetune pretrained_infer")
    comparison = open_project(context).compare(experiments, html=html, force=force)
    Console().print(ComparisonView(comparison))
    if html is not None:
        say(f"written: {html}")


def export(
    context: typer.Context,
    experiments: Annotated[list[str], typer.Argument(help="One recorded experiment per matbench task.")],
    output: Annotated[Path, typer.Option(help="Parent folder of the submission.")] = Path(),
    authors: Annotated[str, typer.Option(help="Authors' names for info.json.")] = "",
    algorithm: Annotated[str, typer.Option(help="Name of the algorithm on the leaderboard.")] = "",
    notes: Annotated[str, typer.Option(help="Free text for info.json.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a previous export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a submission for the matbench leaderboard, or explain why the results do not qualify.

    Experiments on several tasks go into one submission, as matbench expects from a general-purpose algorithm.

    Example: mbqueue export full_finetune --authors "A. Researcher"
    """
    folder = open_project(context).export(
        experiments, output, authors=authors, algorithm=algorithm, notes=notes, force=force
    )
    files = sorted(str(path) for path in folder.iterdir())
    if as_json:
        print_json(files)
    else:
        for path in files:
            print_line(path)


def export_study(
    context: typer.Context,
    search: SearchArgument,
    output: Annotated[Path, typer.Option(help="SQLite file to write, or its folder.")] = Path("study.db"),
    force: ForceOption = False,
) -> None:
    """Export a finished or running search as an Optuna study, for optuna-dashboard and optuna.load_study.

    Example: mbqueue export-study rates --output study.db
    """
    print_line(str(open_project(context).export_study(search, output, force=force)))

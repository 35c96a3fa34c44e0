"""Commands that read results: report, compare, export, export-study."""

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
        Path | None, typer.Option(help="The HTML file, or a folder for it; by default the results folder.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also draw each figure as PNG in this folder.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write one self-contained HTML page: scores, curves, errors by element and size, worst crystals, sessions.

    Works for finished and running experiments. Opens in any browser without a network. The page of a search has the
    history of the best score, parallel coordinates, the importance of settings and all learning curves.

    Example: mbqueue report full_finetune --output report.html
    """
    project = open_project(context)
    if project.is_search(experiment):
        (summary,) = project.status(experiment).overview["searches"]
        if summary["state"] != "done":
            say(f"{experiment} is not done yet: the report covers what is done so far.", style="yellow")
    elif not project.results(experiment).is_complete:
        say(f"{experiment} is not recorded yet: the report covers what is done so far.", style="yellow")
    for path in project.report(experiment, output=output, png=png, force=force):
        print_line(str(path))


def compare(
    context: typer.Context,
    experiments: Annotated[
        list[str], typer.Argument(help="Two or more recorded experiments, each once; the first is the reference.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write this HTML page.")] = None,
    force: ForceOption = False,
) -> None:
    """Compare experiments with paired differences per crystal, beside matbench's leaderboard.

    Example: mbqueue compare full_finetune head_finetune pretrained_infer
    """
    from mbqueue.dashboard.comparison import render_comparison

    if len(experiments) < 2:
        raise UsageError("Give at least two experiments, like: mbqueue compare full_finetune pretrained_infer")
    comparison = open_project(context).compare(experiments, html=html, force=force)
    Console().print(render_comparison(comparison))
    if html is not None:
        say(f"written: {html}")


def export(
    context: typer.Context,
    experiments: Annotated[list[str], typer.Argument(help="Recorded experiments, one for each task.")],
    output: Annotated[Path, typer.Option(help="Folder to write the submission's folder into.")] = Path(),
    authors: Annotated[str, typer.Option(help="Names for info.json.")] = "",
    algorithm: Annotated[str, typer.Option(help="Name of the algorithm on the leaderboard.")] = "",
    notes: Annotated[str, typer.Option(help="Free text for info.json.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a submission for matbench's leaderboard, or say why the results do not qualify.

    Several experiments on different tasks make one folder, as a general-purpose algorithm submits them.

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
    output: Annotated[Path, typer.Option(help="The SQLite file, or a folder for it.")] = Path("study.db"),
    force: ForceOption = False,
) -> None:
    """Write a search as an Optuna study for optuna-dashboard and optuna.load_study, also while it runs.

    Example: mbqueue export-study rates --output study.db
    """
    print_line(str(open_project(context).export_study(search, output, force=force)))

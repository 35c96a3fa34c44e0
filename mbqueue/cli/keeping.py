"""Commands that save, restore or move a project's state: recover, backup, restore, migrate-queue, move-commits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbqueue.cli.console import print_line, say
from mbqueue.cli.options import open_project
from mbqueue.errors import counted

ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace the queue even if it is undamaged; mbqueue keeps a copy.")
]


def recover(context: typer.Context, force: ForceOption = False) -> None:
    """Rebuild a lost or damaged queue from the manifests of the checkpoints.

    The new queue contains all finished epochs. The next session repeats the predictions and computes the scores again.

    Example: mbqueue recover
    """
    found = open_project(context).recover(force=force)
    for experiment, fold, epochs in found.folds:
        print_line(f"{experiment} fold {fold}: {counted(epochs, 'epoch')}")
    if found.replaced is not None:
        say(f"The old queue is kept as {found.replaced}")


def backup(context: typer.Context, file: Annotated[Path, typer.Argument(help="The .tar file to write.")]) -> None:
    """Write the project's queue, checkpoints, results, experiment files and settings to one archive.

    You can make a backup while sessions are running.

    Example: mbqueue backup monday.tar
    """
    made = open_project(context).back_up(file)
    print_line(f"{file}: {counted(made.files, 'file')}, {counted(made.commits, 'commit')}, {made.size / 1e6:.1f} MB")


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="An archive from `mbqueue backup`.")],
    force: ForceOption = False,
) -> None:
    """Check a whole archive, then replace the project's state with its contents.

    On a new machine, run `mbqueue init` first to create a project.

    Example: mbqueue restore monday.tar
    """
    found = open_project(context).restore(file, force=force)
    print_line(f"{file}: {counted(found.files, 'file')}, {counted(found.commits, 'commit')} restored")


def migrate_queue(
    context: typer.Context,
    to: Annotated[str, typer.Argument(help="postgresql://USER@HOST/DATABASE, or sqlite for a file in state/.")],
) -> None:
    """Move the queue into an empty database, with all jobs, fences and events.

    End all sessions before you run this command. Afterwards, change mbqueue.toml or MBQUEUE_QUEUE as the command tells
    you. The old database stays, but refuses all sessions.

    Example: mbqueue migrate-queue postgresql://me@server/mbqueue
    """
    made = open_project(context).migrate_queue(to)
    of_no_interest = {"needs", "commits_place"}
    rows = ", ".join(f"{count} {table}" for table, count in made.rows.items() if table not in of_no_interest)
    print_line(f"{made.source} → {made.target}: {rows}")
    if to == "sqlite":
        say("To continue: remove `queue` from mbqueue.toml, and unset MBQUEUE_QUEUE.")
    else:
        say(
            "To continue: set MBQUEUE_QUEUE to this URL. If the URL contains no password, you can instead set "
            'queue = "postgresql://…" in mbqueue.toml.'
        )


def move_commits(
    context: typer.Context,
    lost: Annotated[
        bool,
        typer.Option(
            "--lost", help="Move even if checkpoints of finished epochs are lost; those epochs are trained again."
        ),
    ] = False,
) -> None:
    """Move the commits to the store in mbqueue.toml or, without a store, to the project's folder.

    A queue refuses sessions that use a different store. To move the commits, end all sessions, change or remove `store`
    in mbqueue.toml, then run this command. The command copies the commits, then updates the queue.

    Example: mbqueue move-commits
    """
    made = open_project(context).move_commits(lost=lost)
    print_line(f"{made.source or 'unknown location'} → {made.target}: {counted(made.copied, 'object')} copied")
    if made.lost:
        say(f"The next sessions train these epochs again: {made.lost}")

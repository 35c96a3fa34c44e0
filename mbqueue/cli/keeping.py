"""Commands that keep the state safe: recover, backup, restore, migrate-queue, move-commits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbqueue.cli.console import print_line, say
from mbqueue.cli.options import open_project
from mbqueue.errors import counted

ForceOption = Annotated[bool, typer.Option("--force", help="Replace a queue that is not damaged; a copy is kept.")]


def recover(context: typer.Context, force: ForceOption = False) -> None:
    """Rebuild a lost or damaged queue from the manifests of the checkpoints.

    Finished epochs come back as they were. The next session repeats predictions and records.

    Example: mbqueue recover
    """
    found = open_project(context).recover(force=force)
    for experiment, fold, epochs in found.folds:
        print_line(f"{experiment} fold {fold}: {counted(epochs, 'epoch')}")
    if found.replaced is not None:
        say(f"The old queue is now {found.replaced}")


def backup(context: typer.Context, file: Annotated[Path, typer.Argument(help="The archive to write, a .tar.")]) -> None:
    """Write the whole state to one archive: queue, checkpoints, results, jobs, settings. Sessions may keep running.

    Example: mbqueue backup monday.tar
    """
    made = open_project(context).back_up(file)
    print_line(f"{file}: {counted(made.files, 'file')}, {counted(made.commits, 'commit')}, {made.size / 1e6:.1f} MB")


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="An archive written by backup.")],
    force: ForceOption = False,
) -> None:
    """Replace the project's state with that of an archive, after checking the whole archive.

    Example: mbqueue restore monday.tar
    """
    found = open_project(context).restore(file, force=force)
    print_line(f"{file}: {counted(found.files, 'file')}, {counted(found.commits, 'commit')} restored")


def migrate_queue(
    context: typer.Context,
    to: Annotated[str, typer.Argument(help="postgresql://USER@HOST/DATABASE, or sqlite for the file in state/.")],
) -> None:
    """Move the queue into an empty database, with all jobs, fences and events.

    End all sessions first. Afterwards, add the line that this command prints to mbqueue.toml. The old database stays
    but refuses sessions, so none can continue with it.

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
            "To continue: set MBQUEUE_QUEUE to that URL. If the URL has no password, you can instead set "
            'queue = "postgresql://…" in mbqueue.toml.'
        )


def move_commits(
    context: typer.Context,
    lost: Annotated[
        bool,
        typer.Option("--lost", help="Move although checkpoints of finished epochs are lost; train those epochs again."),
    ] = False,
) -> None:
    """Move the queue's commits to the store in the settings, or into the project's folder if there is none.

    A queue refuses sessions that use a different store. To move its commits, end all sessions, change or remove
    `store`, and run this command, which copies the commits and then updates the queue.

    Example: mbqueue move-commits
    """
    made = open_project(context).move_commits(lost=lost)
    print_line(f"{made.source or 'unknown place'} → {made.target}: {made.copied} objects copied")
    if made.lost:
        say(f"Will be trained again: {made.lost}")

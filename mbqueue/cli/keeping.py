"""Commands that keep the state safe: recover, backup, restore, migrate-queue, move-commits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbqueue.cli.console import print_line, say
from mbqueue.cli.options import open_project

ForceOption = Annotated[bool, typer.Option("--force", help="Replace a queue that is whole; it is kept beside it.")]


def recover(context: typer.Context, force: ForceOption = False) -> None:
    """Rebuild the queue from the manifests of the checkpoints alone, when its database is lost or damaged.

    Finished epochs come back as they were; predictions and records are made again by the next session.

    Example: mbqueue recover
    """
    found = open_project(context).recover(force=force)
    for experiment, fold, epochs in found.folds:
        print_line(f"{experiment} fold {fold}: {epochs} epochs")
    if found.replaced is not None:
        say(f"The queue that was there is now {found.replaced}")


def backup(context: typer.Context, file: Annotated[Path, typer.Argument(help="The archive to write, a .tar.")]) -> None:
    """Write the whole state to one archive: queue, checkpoints, results, jobs, settings. Sessions may go on meanwhile.

    Example: mbqueue backup monday.tar
    """
    made = open_project(context).back_up(file)
    print_line(f"{file}: {made.files} files, {made.commits} commits, {made.size / 1e6:.1f} MB")


def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="An archive that backup wrote.")],
    force: ForceOption = False,
) -> None:
    """Put the state of an archive in place of this project's. It is checked whole before anything is touched.

    Example: mbqueue restore monday.tar
    """
    found = open_project(context).restore(file, force=force)
    print_line(f"{file}: {found.files} files, {found.commits} commits restored")


def migrate_queue(
    context: typer.Context,
    to: Annotated[str, typer.Argument(help="postgresql://USER@HOST/DATABASE, or sqlite for the file in state/.")],
) -> None:
    """Move the queue into an empty database: jobs, fences, events, all as they are.

    End all sessions first. Afterwards, say in mbqueue.toml where the queue is now; this command prints the line. The
    database that it was in is kept and refuses to be worked with, so that no session goes on with the old one.

    Example: mbqueue migrate-queue postgresql://me@server/mbqueue
    """
    made = open_project(context).migrate_queue(to)
    of_no_interest = {"needs", "commits_place"}
    rows = ", ".join(f"{count} {table}" for table, count in made.rows.items() if table not in of_no_interest)
    print_line(f"{made.source} → {made.target}: {rows}")
    if to == "sqlite":
        say("Go on with it: take `queue` out of mbqueue.toml, and unset MBQUEUE_QUEUE.")
    else:
        say(
            "Go on with it: set MBQUEUE_QUEUE to the URL you gave, or, without a password in it, "
            'queue = "postgresql://…" in mbqueue.toml.'
        )


def move_commits(
    context: typer.Context,
    lost: Annotated[
        bool,
        typer.Option("--lost", help="Go on although the checkpoints of finished epochs are lost; train those again."),
    ] = False,
) -> None:
    """Move the queue's commits to the store named in the settings, or to the project's folder when none is.

    The queue knows where its commits are, and refuses sessions that have another store, or none. To move them on
    purpose, end all sessions, set `store` (or take it out), and run this: it copies them first, then tells the queue.

    Example: mbqueue move-commits
    """
    made = open_project(context).move_commits(lost=lost)
    print_line(f"{made.source or 'not known before'} → {made.target}: {made.copied} objects copied")
    if made.lost:
        say(f"Will be trained again: {made.lost}")

"""Taking along what lies beside a queue, when the queue goes where another folder is the live one.

On a cluster's file system that is so: with the queue on a server its machines share the commits in state/, and with
the queue in a file they are in a live folder on a local disk. Nothing is removed, so the way back is open.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mbqueue import files
from mbqueue.drive.livestate import LiveState
from mbqueue.drive.snapshots import Snapshots
from mbqueue.project import ProjectFolder
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Damaged
from mbqueue.storage.mounted import Drive
from mbqueue.storage.places import in_folder, named_after


def take_commits(source: ProjectFolder, target: ProjectFolder, *, differs: Callable[[str], None]) -> None:
    """Copy commits, and what was asked for, from one live folder to another; what is there already stays.

    Args:
        differs: called for each commit that differs in the target.
    """
    for folder in source.fold_dirs():
        identity = named_after(folder)
        here = Commits(in_folder(folder), identity)
        there = Commits(in_folder(target.checkpoints_dir(identity.experiment, identity.fold)), identity)
        taken = {commit.base: commit for commit in there.commits()}
        for commit in here.commits():
            with suppress(Damaged):
                checkpoint = here.checkpoint(commit)
                if commit.base not in taken:
                    there.put(commit, checkpoint)
                elif taken[commit.base] != commit:
                    differs(
                        f"{there.place.name}/{commit.base}.json stays as it is, and is another commit than that in "
                        f"{folder}."
                    )
    for path in source.wanted_dir.glob("*.json"):
        if not (target.wanted_dir / path.name).exists():
            files.write_bytes(target.wanted_dir / path.name, path.read_bytes())


def take_results(source: ProjectFolder, target: ProjectFolder) -> None:
    """Copy result files to where the sessions of the target make theirs."""
    base = source.working_results("results")
    for path in base.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            taken = target.working_results("results") / path.relative_to(base)
            if not taken.exists() or files.sha256_of_file(taken) != files.sha256_of_file(path):
                files.write_bytes(taken, path.read_bytes())


def follow_snapshots(project: ProjectFolder) -> None:
    """Let the queue that is about to be the live one count as later than every snapshot on the mount."""
    state = LiveState.load(project.publishing_file)
    for snapshot in Snapshots(Drive(project.root)).listed():
        listing = snapshot.listing
        state.number = max(state.number, listing.number)
        state.ancestry[listing.database] = max(listing.number, state.ancestry.get(listing.database, 0))
    state.save(project.publishing_file)


def stray_state(project: ProjectFolder) -> Path | None:
    """Of a split project: a queue or commit that sessions without a live folder left in state/, where none looks."""
    unsplit = project.unsplit
    if unsplit.queue_db.exists():
        return unsplit.queue_db
    return next(
        (folder for folder in unsplit.fold_dirs() if Commits(in_folder(folder), named_after(folder)).bases()), None
    )

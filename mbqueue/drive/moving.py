"""Copy commits and results to the new live folder after a queue has moved.

For a project on a cluster's file system, the location of the commits depends on the queue. If the queue is on a server,
the machines share the commits in state/. If the queue is a file, the commits are in a live folder on a local disk. No
files are removed, so you can move the queue back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mbqueue import files
from mbqueue.drive.livestate import LiveState
from mbqueue.drive.notes import note_files
from mbqueue.drive.snapshots import Snapshots
from mbqueue.project import ProjectFolder
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Damaged
from mbqueue.storage.mounted import Drive
from mbqueue.storage.places import in_folder, named_after


def take_commits(source: ProjectFolder, target: ProjectFolder, *, differs: Callable[[str], None]) -> None:
    """Copy commits and notes from one live folder to another without replacing files. Both may be the same folder.

    Args:
        differs: called with a message for each commit that differs from its copy in the target.
    """
    if source.live_dir == target.live_dir:
        return
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
                        f"{there.place.name}/{commit.base} differs from the commit of that name in {folder}, and "
                        "was left unchanged."
                    )
    for path in note_files(source):
        if not (target.notes_dir / path.name).exists():
            files.write_bytes(target.notes_dir / path.name, path.read_bytes())


def take_results(source: ProjectFolder, target: ProjectFolder) -> None:
    """Copy result files to the folder in which the target's sessions write results."""
    base = source.working_results("results")
    for path in base.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            taken = target.working_results("results") / path.relative_to(base)
            if not taken.exists() or files.sha256_of_file(taken) != files.sha256_of_file(path):
                files.write_bytes(taken, path.read_bytes())


def follow_snapshots(project: ProjectFolder) -> None:
    """Give the next snapshot a higher number than every snapshot on the mount, so that it counts as the newest."""
    state = LiveState.load(project.publishing_file)
    for snapshot in Snapshots(Drive(project.root)).listed():
        listing = snapshot.listing
        state.number = max(state.number, listing.number)
        state.ancestry[listing.database] = max(listing.number, state.ancestry.get(listing.database, 0))
    state.save(project.publishing_file)


def stray_state(project: ProjectFolder) -> Path | None:
    """Find a queue or commits that sessions without a live folder left in state/; None if there are none.

    While the project has a live folder, mbqueue reads no queue and no commits from state/.
    """
    unsplit = project.unsplit
    if unsplit.queue_db.exists():
        return unsplit.queue_db
    return next(
        (folder for folder in unsplit.fold_dirs() if Commits(in_folder(folder), named_after(folder)).bases()), None
    )

"""Move commits and results along with a queue when its move changes the live folder.

A move changes the live folder on a cluster's file system. With the queue on a server, the machines share the commits in
state/. With the queue in a file, the commits are in a live folder on a local disk. No files are removed, so you can
move back.
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
    """Copy commits and users' requests from one live folder to another without replacing files.

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
                        f"{there.place.name}/{commit.base}.json is a different commit from the one in {folder}, and "
                        "was left unchanged."
                    )
    for path in source.wanted_dir.glob("*.json"):
        if not (target.wanted_dir / path.name).exists():
            files.write_bytes(target.wanted_dir / path.name, path.read_bytes())


def take_results(source: ProjectFolder, target: ProjectFolder) -> None:
    """Copy result files to where the target's sessions write theirs."""
    base = source.working_results("results")
    for path in base.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            taken = target.working_results("results") / path.relative_to(base)
            if not taken.exists() or files.sha256_of_file(taken) != files.sha256_of_file(path):
                files.write_bytes(taken, path.read_bytes())


def follow_snapshots(project: ProjectFolder) -> None:
    """Make the queue that becomes the live queue count as later than every snapshot on the mount."""
    state = LiveState.load(project.publishing_file)
    for snapshot in Snapshots(Drive(project.root)).listed():
        listing = snapshot.listing
        state.number = max(state.number, listing.number)
        state.ancestry[listing.database] = max(listing.number, state.ancestry.get(listing.database, 0))
    state.save(project.publishing_file)


def stray_state(project: ProjectFolder) -> Path | None:
    """A queue or commit in a split project's state/, left by sessions without a live folder. mbqueue reads neither."""
    unsplit = project.unsplit
    if unsplit.queue_db.exists():
        return unsplit.queue_db
    return next(
        (folder for folder in unsplit.fold_dirs() if Commits(in_folder(folder), named_after(folder)).bases()), None
    )

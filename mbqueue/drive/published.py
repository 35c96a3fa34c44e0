"""What is published of the training: commits on the mount, which of them make the accepted chain, and which do not.

A commit is two files, STEM-HASH.pt and STEM-HASH.json; HASH is the beginning of the manifest's own SHA-256, so no two
commits share a name, and a manifest that was cut off is known by its name. A mount that made `name (1)` of a second
file is read all the same.

Sessions that knew nothing of each other may have trained one fold from one commit on. Merging looks at the commits
alone, by their one order (`mbqueue.storage.manifest`). The accepted chain is the greatest commit with the history in
its manifest and the commit of its best epoch, which must be one of its own line: its history is the beginning of the
other's, row for row with sessions and times. Commits of another line stay where they are and are reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mbqueue.drive.retention import places_to_keep
from mbqueue.project import NAME_PATTERN, PUBLISHED_CHECKPOINTS
from mbqueue.storage.commits import Commit, Commits
from mbqueue.storage.manifest import Damaged, Identity, Manifest
from mbqueue.storage.mounted import Drive
from mbqueue.storage.places import on_mount

#: Commits of a line that are kept on the mount, besides that of its best epoch and those that are not settled yet.
KEPT = 2


class PublishedFold(Commits):
    """The commits of one fold on the mount.

    Args:
        on_damaged: told the path and the reason of each file that is not what it should be, once each. It may still
            be on its way, so it is looked at again the next time.
    """

    def __init__(
        self,
        drive: Drive,
        identity: Identity,
        on_damaged: Callable[[str, str], None] = lambda _path, _why: None,
    ) -> None:
        place = on_mount(drive, identity)
        super().__init__(place, identity, lambda base, why: on_damaged(place.path(base), why))
        self._seen_at: dict[str, float] = {}

    def has(self, commit: Commit) -> bool:
        """Whether both files of a commit are there, whole or not."""
        there = {(file.base, file.suffix) for _, _, file in self._files()}
        return {(commit.base, "json"), (commit.base, "pt")} <= there

    def retire(self, ours: Manifest, *, now: float, steady_since: float) -> None:
        """Remove commits of our own line that newer ones replace which have been on the mount for long enough.

        Only a whole one replaces others: what a machine that died was just uploading may stay cut off for ever.

        Args:
            now, steady_since: see `mbqueue.drive.retention`.
        """
        line = [one for one in self.commits() if ours.continues(one.manifest)]
        whole = [one for one in line if one.base in self._seen_at or self._is_whole(one)]
        self._seen_at = {one.base: self._seen_at.get(one.base, now) for one in whole}
        places = places_to_keep([*self._seen_at.values()], now, kept=KEPT, steady_since=steady_since)
        kept = [whole[place].manifest for place in sorted(places)]
        needed = {one.stem for one in kept} | {one.best["commit"] for one in kept if one.best}
        for commit in line:
            is_replaced = commit.base in self._seen_at or (kept and commit.manifest.rank < kept[0].rank)
            if is_replaced and commit.manifest.stem not in needed:
                self.remove(commit)

    def _is_whole(self, commit: Commit) -> bool:
        try:
            self.checkpoint(commit)
        except Damaged as error:
            self._wrong(commit.base, error)
            return False
        return True


def experiment_folders(drive: Drive, folder: str) -> list[str]:
    """Names in a folder that an experiment may have; a drive's own programs put other files there."""
    return [name for name in drive.names(folder) if re.fullmatch(NAME_PATTERN, name)]


def published_folds(drive: Drive) -> list[tuple[str, int]]:
    """(experiment, fold) of everything that has commits on the mount."""
    found = []
    for experiment in experiment_folders(drive, PUBLISHED_CHECKPOINTS):
        for name in drive.names(f"{PUBLISHED_CHECKPOINTS}/{experiment}"):
            if re.fullmatch(r"fold_[0-4]", name):
                found.append((experiment, int(name[-1])))  # noqa: PERF401 - reads better than one expression
    return found

"""The commits on the mount, and which of them are accepted.

A commit is two files, STEM-HASH.pt and STEM-HASH.json. HASH is the beginning of the manifest's SHA-256, so no two
commits share a name, and a truncated manifest is detected. Files that the mount renamed to `name (1)` are read too.

Two sessions that could not see each other's commits may have trained the same fold. mbqueue accepts the training run
whose commit has the highest rank (`mbqueue.storage.manifest`), and uses only two commits of a run: the highest-ranked
one and that of the best epoch. The history of the best epoch's commit must be identical to the first rows of the
highest-ranked commit's history, including sessions and times. Commits of other runs are kept and reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mbqueue.drive.retention import positions_to_keep
from mbqueue.project import NAME_PATTERN, PUBLISHED_CHECKPOINTS, fold_named
from mbqueue.storage.commits import Commits
from mbqueue.storage.manifest import Commit, Damaged, Identity, Manifest
from mbqueue.storage.mounted import Drive
from mbqueue.storage.places import on_mount

#: Keep this many of the newest commits that count as uploaded, and the commit of the best epoch.
KEPT = 2


class PublishedFold(Commits):
    """The commits of one fold on the mount.

    Args:
        on_damaged: called once with the path and the reason for each damaged file. A damaged file is read again next
            time, because its upload may not be complete.
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
        """Whether both files of a commit are on the mount; the files may be damaged."""
        there = {self.place.path(file.name) for _, _, file in self._files()}
        return {self.place.manifest(commit), self.place.checkpoint(commit)} <= there

    def retire(self, ours: Manifest, *, now: float, steady_since: float) -> None:
        """Remove superseded commits of the live folder's training run once their successors have had time to upload.

        Only an intact commit supersedes others, because the last upload of a dead machine may stay truncated forever.

        Args:
            ours: manifest of the live folder's newest commit.
            now, steady_since: see `mbqueue.drive.retention`.
        """
        line = [one for one in self.commits() if ours.continues(one.manifest)]
        whole = [one for one in line if one.base in self._seen_at or self._is_whole(one)]
        self._seen_at = {one.base: self._seen_at.get(one.base, now) for one in whole}
        positions = positions_to_keep([*self._seen_at.values()], now, kept=KEPT, steady_since=steady_since)
        kept = [whole[position].manifest for position in sorted(positions)]
        needed = {stem for manifest in kept for stem in manifest.needed_stems}
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
    """List the valid experiment names in a folder, and leave out other names, such as files that a drive adds."""
    return [name for name in drive.names(folder) if re.fullmatch(NAME_PATTERN, name)]


def published_folds(drive: Drive) -> list[tuple[str, int]]:
    """List every fold with commits on the mount, as (experiment, fold)."""
    found = []
    for experiment in experiment_folders(drive, PUBLISHED_CHECKPOINTS):
        for name in drive.names(f"{PUBLISHED_CHECKPOINTS}/{experiment}"):
            if (fold := fold_named(name)) is not None:
                found.append((experiment, fold))  # noqa: PERF401 - reads better than one expression
    return found

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

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mbqueue.drive.mounted import DUPLICATE, Drive
from mbqueue.drive.reading import Reader
from mbqueue.drive.retiring import places_to_keep
from mbqueue.project import NAME_PATTERN, PUBLISHED_CHECKPOINTS
from mbqueue.storage.manifest import LARGEST_MANIFEST, Identity, Manifest, Rank, manifest_named
from mbqueue.storage.names import HASH_DIGITS, CommitFile, commit_file

#: Commits of a line that are kept on the mount, besides that of its best epoch and those that are not settled yet.
KEPT = 2


@dataclass(frozen=True)
class PublishedCommit:
    """A commit on the mount.

    Attributes:
        base: name of its files without the suffix.
        content: bytes of the manifest.
    """

    folder: str
    base: str
    manifest: Manifest
    content: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """For messages, and the name under which it is remembered."""
        return f"{self.folder}/{self.base}"


@dataclass(frozen=True)
class Chain:
    """An accepted chain whose files are whole.

    Attributes:
        newest: the commit to go on from.
        best: that of its best epoch; None when no epoch is finished.
    """

    newest: PublishedCommit
    best: PublishedCommit | None

    @property
    def commits(self) -> list[PublishedCommit]:
        """The commits that are needed to go on, the newest last."""
        return [self.newest] if self.best is None or self.best is self.newest else [self.best, self.newest]


def base_name(manifest: Manifest, content: bytes) -> str:
    """Name of a commit's published files without the suffix."""
    return f"{manifest.stem}-{hashlib.sha256(content).hexdigest()[:HASH_DIGITS]}"


class PublishedFold:
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
        self.drive, self.identity = drive, identity
        self.folder = f"{PUBLISHED_CHECKPOINTS}/{identity.experiment}/fold_{identity.fold}"
        self._reader = Reader(drive, on_damaged)
        self._known: dict[str, PublishedCommit] = {}
        self._seen_at: dict[str, float] = {}

    def commits(self) -> list[PublishedCommit]:
        """Every commit with a whole manifest, in the order of `Manifest.rank`."""
        found: dict[str, PublishedCommit] = {}
        for name in self.drive.names(self.folder):
            file = commit_file(name)
            if file is None or file.suffix != "json" or not file.digits or file.base in found:
                continue
            commit = self._known.get(file.base) or self._read(name, file)
            if commit is not None:
                found[file.base] = commit
        return sorted(found.values(), key=lambda commit: commit.manifest.rank)

    def chain(self, *, above: Rank | None = None) -> Chain | None:
        """The accepted chain, every file of it verified; None when there is none (or none that is above a rank)."""
        commits = self.commits()
        for commit in reversed(commits):
            if above is not None and commit.manifest.rank <= above:
                return None
            best = self._best_of(commit, commits)
            if self.checkpoint(commit) is None:
                continue
            if commit.manifest.best is None:
                return Chain(commit, None)
            if best is not None:
                return Chain(commit, best)
            self._reader.tell(commit.path, "the commit of its best epoch is missing or damaged")
        return None

    def checkpoint(self, commit: PublishedCommit) -> bytes | None:
        """The bytes of a commit's checkpoint, whichever of its files is whole; None, and told, when none is."""
        manifest = commit.manifest
        return self._reader.whole(commit.path, ".pt", size=manifest.size, sha256=manifest.sha256, what="checkpoint")

    def retire(self, ours: Manifest, *, now: float, steady_since: float) -> None:
        """Remove commits of our own line that newer ones replace which have been on the mount for long enough.

        Only a whole one replaces others: what a machine that died was just uploading may stay cut off for ever.

        Args:
            now, steady_since: see `mbqueue.drive.retiring`.
        """
        line = [one for one in self.commits() if ours.continues(one.manifest)]
        whole = [one for one in line if one.base in self._seen_at or self.checkpoint(one) is not None]
        self._seen_at = {one.base: self._seen_at.get(one.base, now) for one in whole}
        places = places_to_keep([*self._seen_at.values()], now, kept=KEPT, steady_since=steady_since)
        kept = [whole[place].manifest for place in sorted(places)]
        needed = {one.stem for one in kept} | {one.best["commit"] for one in kept if one.best}
        for commit in line:
            is_replaced = commit.base in self._seen_at or (kept and commit.manifest.rank < kept[0].rank)
            if is_replaced and commit.manifest.stem not in needed:
                self.remove(commit)

    def remove(self, commit: PublishedCommit) -> None:
        """Remove a commit's files, the manifest first: one whose checkpoint is gone must not seem to exist."""
        for suffix in (".json", ".pt"):
            pattern = re.compile(re.escape(commit.base) + DUPLICATE + re.escape(suffix))
            for name in self.drive.names(self.folder):
                if pattern.fullmatch(name):
                    self.drive.remove(f"{self.folder}/{name}")
        self._known.pop(commit.base, None)

    def _best_of(self, commit: PublishedCommit, commits: Iterable[PublishedCommit]) -> PublishedCommit | None:
        best = commit.manifest.best
        if best is None:
            return None
        for candidate in commits:
            named = candidate.manifest.stem == best["commit"] and commit.manifest.continues(candidate.manifest)
            if named and (candidate is commit or self.checkpoint(candidate) is not None):
                return candidate
        return None

    def _read(self, name: str, file: CommitFile) -> PublishedCommit | None:
        path = f"{self.folder}/{name}"

        def parse(content: bytes) -> PublishedCommit:
            manifest = manifest_named(file.stem, content, source=path, identity=self.identity)
            return PublishedCommit(self.folder, file.base, manifest, content)

        commit = self._reader.parsed(path, file.digits, parse, at_most=LARGEST_MANIFEST)
        if commit is not None:
            self._known[file.base] = commit
        return commit


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

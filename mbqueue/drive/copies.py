"""A fold's commits in a live folder whose published copies mend what is damaged."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbqueue import files
from mbqueue.drive.mounted import Drive
from mbqueue.drive.published import PublishedCommit, PublishedFold
from mbqueue.errors import CheckpointError
from mbqueue.storage.manifest import Damaged, Identity, Manifest, manifest_named
from mbqueue.storage.places import LocalPlace


@dataclass(frozen=True)
class MendedPlace(LocalPlace):
    """A local folder. A file of it that is missing or damaged is fetched again from the mount, if that very commit is
    published there; else it is as damaged as in any other folder.

    Attributes:
        published: the fold's commits on the mount.
        note: told, in a sentence, what was mended.
    """

    published: PublishedFold
    note: Callable[[str], None]

    def manifest(self, stem: str) -> bytes:
        content = super().manifest(stem)
        try:
            manifest_named(stem, content, source=stem, identity=self.identity)
        except Damaged:
            copy = self._copy_of(stem)
            if copy is not None:
                self._mend(f"{stem}.json", copy.content)
                return copy.content
        except CheckpointError:
            pass  # of a newer format: whoever reads it says so
        return content

    def checkpoint(self, manifest: Manifest) -> bytes:
        try:
            content = super().checkpoint(manifest)
            if hashlib.sha256(content).hexdigest() == manifest.sha256:
                return content
        except Damaged:
            content = None
        copy = self._checkpoint_of(manifest)
        if copy is not None:
            self._mend(f"{manifest.stem}.pt", copy)
            return copy
        return super().checkpoint(manifest) if content is None else content

    def _copy_of(self, stem: str) -> PublishedCommit | None:
        """The published commit whose checkpoint is the one here: two lines may have given one name to two commits."""
        with contextlib.suppress(OSError):
            sha256 = files.sha256_of_file(self.folder / f"{stem}.pt")
            for commit in self.published.commits():
                if commit.manifest.stem == stem and commit.manifest.sha256 == sha256:
                    return commit
        return None

    def _checkpoint_of(self, manifest: Manifest) -> bytes | None:
        with contextlib.suppress(OSError):  # a mount that fails cannot help
            for commit in self.published.commits():
                if (commit.manifest.stem, commit.manifest.sha256) == (manifest.stem, manifest.sha256):
                    return self.published.checkpoint(commit)
        return None

    def _mend(self, name: str, content: bytes) -> None:
        files.write_bytes(self.folder / name, content)
        self.note(f"{self.folder / name} was damaged; its published copy was fetched.")


def mended_place(root: Path, folder: Path, identity: Identity, note: Callable[[str], None]) -> MendedPlace:
    """The commits of a fold in a live folder, and on the mount where the project at ``root`` lies."""
    return MendedPlace(folder, identity, PublishedFold(Drive(root), identity), note)

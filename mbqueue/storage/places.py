"""Where a fold's commits are stored, and how their files are named (`mbqueue.storage.names`).

| location | manifest | checkpoint |
|---|---|---|
| a folder | STEM.json | STEM.pt |
| an object store | STEM.json | STEM-HASH.pt, with its own hash, so no writer overwrites another |
| a mount | STEM-HASH.json | STEM-HASH.pt, both with the manifest's hash |

On a mount, `create` cannot refuse a second writer. So the hash gives every commit a different name. The hash also shows
readers whether a manifest is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mbqueue.project import (
    FOLD_PATTERN,
    PUBLISHED_CHECKPOINTS,
    STORED_CHECKPOINTS,
    ProjectFolder,
    fold_name,
    fold_named,
)
from mbqueue.storage.blobs import Blobs, Folder
from mbqueue.storage.manifest import Commit, Identity
from mbqueue.storage.names import CHECKPOINT, MANIFEST, CommitFile, file_name, hashed_name, manifests_named, with_hash


@dataclass(frozen=True)
class Place:
    """A folder of blobs that contains one fold's commits. Files whose names have a different format are ignored."""

    blobs: Blobs
    folder: str
    has_hashed_manifests: bool = False
    has_hashed_checkpoints: bool = False

    @property
    def name(self) -> str:
        """The folder's address, as shown in messages."""
        return f"{self.blobs.url}/{self.folder}" if self.folder else self.blobs.url

    def path(self, name: str) -> str:
        """The path under which ``blobs`` stores a file."""
        return f"{self.folder}/{name}" if self.folder else name

    def is_manifest(self, file: CommitFile) -> bool:
        """Whether ``file`` is the manifest of a commit."""
        return file.suffix == MANIFEST and bool(file.digits) is self.has_hashed_manifests

    def is_checkpoint(self, file: CommitFile) -> bool:
        """Whether ``file`` is the checkpoint of a commit."""
        is_hashed = self.has_hashed_manifests or self.has_hashed_checkpoints
        return file.suffix == CHECKPOINT and bool(file.digits) is is_hashed

    def manifest(self, commit: Commit) -> str:
        """The path of a commit's manifest, wherever the commit comes from."""
        return self.path(file_name(self._manifest_base(commit), MANIFEST))

    def checkpoint(self, commit: Commit) -> str:
        """The path of a commit's checkpoint, wherever the commit comes from."""
        hashed = with_hash(commit.manifest.stem, commit.manifest.sha256)
        base = hashed if self.has_hashed_checkpoints else self._manifest_base(commit)
        return self.path(file_name(base, CHECKPOINT))

    def _manifest_base(self, commit: Commit) -> str:
        stem = commit.manifest.stem
        return hashed_name(stem, commit.content) if self.has_hashed_manifests else stem


def in_folder(folder: Path) -> Place:
    """Return the location of commits in a folder, on this machine or shared by the machines of a cluster."""
    return Place(Folder(folder), "")


def in_store(store: Blobs, identity: Identity) -> Place:
    return Place(store, fold_folder(STORED_CHECKPOINTS, identity), has_hashed_checkpoints=True)


def place_of(project: ProjectFolder, store: Blobs | None, identity: Identity) -> Place:
    """Where a fold's commits are stored: in the object store if there is one, else in a folder."""
    if store is not None:
        return in_store(store, identity)
    return in_folder(project.checkpoints_dir(identity.experiment, identity.fold))


def on_mount(drive: Blobs, identity: Identity) -> Place:
    return Place(drive, fold_folder(PUBLISHED_CHECKPOINTS, identity), has_hashed_manifests=True)


def fold_folder(top: str, identity: Identity) -> str:
    """The path of a fold's folder below ``top``, the folder of all checkpoints."""
    return f"{top}/{identity.experiment}/{fold_name(identity.fold)}"


def manifests_below(folder: Path) -> Iterator[tuple[str, int, CommitFile]]:
    """Find the manifests of all commits below the folder of all checkpoints, as `manifests_named` does."""
    return manifests_named(path.relative_to(folder).as_posix() for path in folder.glob(f"*/{FOLD_PATTERN}/*"))


def named_after(folder: Path) -> Identity:
    """The identity of the fold whose folder is EXPERIMENT/fold_i, without the hashes."""
    fold = fold_named(folder.name)
    assert fold is not None
    return Identity(experiment=folder.parent.name, fold=fold)

"""Where the commits of a fold are kept: what `mbqueue.storage.commits.Commits` asks of such a place, and a folder.

A place keeps a manifest under its commit's name, and the checkpoint that belongs to it. It makes both durable without
letting the commit exist (`stage`), and lets it exist by one step that is quick (`publish`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mbqueue.files import TEMP_PREFIX, fsync_dir, make_folder, temp_beside
from mbqueue.storage.manifest import LARGEST_MANIFEST, Damaged, Identity, Manifest
from mbqueue.storage.names import is_stem


class Staging(Protocol):
    """A commit that is durable, but does not exist yet."""

    @property
    def is_published(self) -> bool:
        """Whether it exists."""

    def publish(self) -> None:
        """Let it exist, durably.

        Raises:
            CommitTaken: when another writer made it first.
        """

    def discard(self) -> None:
        """Remove what is left of it, as far as that is certainly of no use; nothing after `publish`."""


class Place(Protocol):
    """Where the commits of one fold are."""

    @property
    def identity(self) -> Identity:
        """Whose commits they must be."""

    @property
    def folder(self) -> Path:
        """A folder on this machine: where they are, or where copies of them are."""

    @property
    def name(self) -> str:
        """Where they are, for people."""

    def stems(self) -> list[str]:
        """Names of the commits that exist, sorted."""

    def manifest(self, stem: str) -> bytes:
        """The manifest of a commit, or the beginning of one that is too long.

        Raises:
            FileNotFoundError: when there is none.
        """

    def checkpoint(self, manifest: Manifest) -> bytes:
        """Bytes of a commit's checkpoint, as many as the manifest says; whether they are those is not looked at.

        Raises:
            Damaged: when it is missing, or of another size.
        """

    def stage(self, manifest: Manifest, checkpoint: bytes, listing: bytes) -> Staging:
        """Make a commit durable; ``listing`` are the bytes of its manifest."""

    def remove(self, manifest: Manifest) -> None:
        """Remove a commit, its manifest first: one whose checkpoint is gone must not seem to exist."""

    def set_aside(self, stem: str) -> bool:
        """Keep a damaged commit under names that nobody reads; False when it was gone already."""

    def tidy(self, existing: Sequence[Manifest]) -> None:
        """Remove checkpoints that none of the existing commits names and that nobody is about to name."""

    def sweep(self) -> None:
        """Remove what a process that died left on this machine. Only for the one process that works on the fold."""


@dataclass(frozen=True)
class _StagedFiles:
    """Two files under temporary names: durable, and nothing to a reader."""

    checkpoint: Path
    listing: Path
    stem: str

    @property
    def is_published(self) -> bool:
        return (self.listing.parent / f"{self.stem}.json").exists()

    def publish(self) -> None:
        self.checkpoint.replace(self.checkpoint.parent / f"{self.stem}.pt")
        self.listing.replace(self.listing.parent / f"{self.stem}.json")
        fsync_dir(self.listing.parent)

    def discard(self) -> None:
        self.checkpoint.unlink(missing_ok=True)
        self.listing.unlink(missing_ok=True)


@dataclass(frozen=True)
class LocalPlace:
    """A folder on a local disk; made when the first commit is written.

    Beside the commits, where a cluster's machines have theirs, may be those published of a queue in a file (their names
    have a hash), which are none of theirs.
    """

    folder: Path
    identity: Identity

    @classmethod
    def found(cls, folder: Path) -> LocalPlace:
        """The folder EXPERIMENT/fold_i as what it is named after; their hashes are not known."""
        return cls(folder, Identity(experiment=folder.parent.name, fold=int(folder.name.removeprefix("fold_"))))

    @property
    def name(self) -> str:
        return str(self.folder)

    def stems(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("e*.json") if is_stem(path.stem))

    def manifest(self, stem: str) -> bytes:
        with (self.folder / f"{stem}.json").open("rb") as stream:
            return stream.read(LARGEST_MANIFEST + 1)

    def checkpoint(self, manifest: Manifest) -> bytes:
        path = self.folder / f"{manifest.stem}.pt"
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size == manifest.size else b""
        except FileNotFoundError as error:
            raise Damaged(f"The checkpoint {path} is missing.") from error
        if len(content) != manifest.size:
            raise Damaged(f"{path} has {size} bytes, its manifest says {manifest.size}.")
        return content

    def stage(self, manifest: Manifest, checkpoint: bytes, listing: bytes) -> Staging:
        make_folder(self.folder)
        staged = _StagedFiles(
            temp_beside(self.folder / f"{manifest.stem}.pt"),
            temp_beside(self.folder / f"{manifest.stem}.json"),
            manifest.stem,
        )
        try:
            _write_through(staged.checkpoint, checkpoint)
            _write_through(staged.listing, listing)
        except BaseException:
            staged.discard()
            raise
        return staged

    def remove(self, manifest: Manifest) -> None:
        (self.folder / f"{manifest.stem}.json").unlink(missing_ok=True)
        (self.folder / f"{manifest.stem}.pt").unlink(missing_ok=True)

    def set_aside(self, stem: str) -> bool:
        for suffix in (".json", ".pt"):
            path = self.folder / f"{stem}{suffix}"
            if path.exists():
                path.replace(path.with_name(path.name + ".damaged"))
        return True

    def tidy(self, existing: Sequence[Manifest]) -> None:
        """Nothing: a checkpoint without its manifest is what a death left, and `sweep` removes that."""

    def sweep(self) -> None:
        for path in self.folder.glob(f"{TEMP_PREFIX}*"):
            path.unlink(missing_ok=True)
        # Of a death between the two steps of publishing, of removing, or of setting aside. The name holds that
        # writer's fence, so nobody else writes to it.
        for path in self.folder.glob("e*.pt"):
            if is_stem(path.stem) and not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())

"""Commits in a folder, on an S3 server or in a shared folder, always with the same simple names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from mbqueue.project import STORED_CHECKPOINTS
from mbqueue.storage.manifest import Commit, Identity, manifest_of
from mbqueue.storage.objects import ObjectStore
from mbqueue.storage.places import fold_folder, in_folder, in_store
from mbqueue.train.checkpoint import Checkpoints

#: The experiment and fold of the commits in most tests.
SMALL = Identity(experiment="small", fold=0)
SMALL_FOLDER = fold_folder(STORED_CHECKPOINTS, SMALL)
_HASH = re.compile(r"-[0-9a-f]{12}\.pt")


def small_commits(folder: Path, fold: int = 0, **hashes: str) -> Checkpoints:
    """The commits of a fold of `small` in a local folder; ``hashes`` restrict them to one spec or dataset."""
    return Checkpoints(in_folder(folder), Identity(experiment="small", fold=fold, **hashes))


@dataclass
class Kept:
    """The commits of one fold, and ways to damage them.

    Attributes:
        folder: folder of the commits or, with a store, of the new machines' copies.
        store: the store with the commits; None if the commits are in ``folder``.
    """

    folder: Path
    store: ObjectStore | None
    _machines: count[int]

    @classmethod
    def at(cls, folder: Path, store: ObjectStore | None) -> Kept:
        return cls(folder, store, count(1))

    def checkpoints(self, on_wrong: Callable[[str, str], None] = lambda _stem, _why: None) -> Checkpoints:
        """The commits as a new machine sees them."""
        if self.store is None:
            return Checkpoints(in_folder(self.folder), SMALL, on_wrong)
        near = self.folder / f"machine-{next(self._machines)}"
        return Checkpoints(in_store(self.store, SMALL), SMALL, on_wrong, near=near)

    def names(self) -> list[str]:
        return sorted(self._real())

    def read(self, name: str) -> bytes:
        if self.store is None:
            return (self.folder / name).read_bytes()
        return self.store.read(self._real()[name], at_most=1 << 30)

    def write(self, name: str, content: bytes) -> None:
        if self.store is None:
            (self.folder / name).write_bytes(content)
        else:
            self.store.put(self._real()[name], content)

    def remove(self, name: str) -> None:
        if self.store is None:
            (self.folder / name).unlink()
        else:
            self.store.remove(self._real()[name])

    def take(self, other: Path) -> None:
        """Copy all commits from the folder ``other``."""
        for path in sorted(other.glob("e*.json")):
            content, listing = path.with_suffix(".pt").read_bytes(), path.read_bytes()
            self.checkpoints().put(Commit(path.stem, manifest_of(listing, source=str(path)), listing), content)

    def _real(self) -> dict[str, str]:
        if self.store is None:
            return {path.name: path.name for path in self.folder.iterdir()}
        prefix = SMALL_FOLDER
        return {_HASH.sub(".pt", name): f"{prefix}/{name}" for name in self.store.names(prefix)}

"""Commits in a folder, on an S3 server and in a shared folder, seen by plain names whatever the place calls them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from mbqueue.objects import ObjectStore
from mbqueue.storage.manifest import Identity, manifest_of
from mbqueue.storage.places import LocalPlace, Place
from mbqueue.storage.store_place import StorePlace, fold_prefix
from mbqueue.train.checkpoint import Checkpoints

#: What the commits of most tests are.
SMALL = Identity(experiment="small", fold=0)
_HASH = re.compile(r"-[0-9a-f]{12}\.pt")


def small_commits(folder: Path, fold: int = 0, **hashes: str) -> Checkpoints:
    """The commits of a fold of `small` in a local folder; those of one spec or dataset, where its hash is given."""
    return Checkpoints(LocalPlace(folder, Identity(experiment="small", fold=fold, **hashes)))


@dataclass
class Kept:
    """The commits of one fold, and a way to harm them.

    Attributes:
        folder: of a local place, where they are; of a store, new machines have their copies below it.
        store: None for a local place.
    """

    folder: Path
    store: ObjectStore | None
    _machines: count[int]

    @classmethod
    def at(cls, folder: Path, store: ObjectStore | None) -> Kept:
        return cls(folder, store, count(1))

    def place(self) -> Place:
        """The place as a machine sees it that has never seen it before."""
        if self.store is None:
            return LocalPlace(self.folder, SMALL)
        return StorePlace(self.store, SMALL, self.folder / f"machine-{next(self._machines)}")

    def checkpoints(self, on_wrong: Callable[[str, str], None] = lambda _stem, _why: None) -> Checkpoints:
        return Checkpoints(self.place(), on_wrong)

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
        """Put the commits of a local folder here."""
        for path in sorted(other.glob("e*.json")):
            content, listing = path.with_suffix(".pt").read_bytes(), path.read_bytes()
            self.place().stage(manifest_of(listing, source=str(path)), content, listing).publish()

    def _real(self) -> dict[str, str]:
        if self.store is None:
            return {path.name: path.name for path in self.folder.iterdir()}
        prefix = fold_prefix("small", 0)
        return {_HASH.sub(".pt", name): f"{prefix}/{name}" for name in self.store.names(prefix)}

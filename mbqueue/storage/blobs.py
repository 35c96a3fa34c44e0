"""Blobs: whole files under names. One interface; a folder, a mount and an object store are its backends.

What a backend promises; tests/storage/test_blobs.py holds all of them to it:

| when `put` returns, the blob … | |
|---|---|
| in a folder (`Folder`) | survives a loss of power |
| on a mount (`mbqueue.storage.mounted.Drive`) | is read back by this machine; by others once it is uploaded |
| in a store (`mbqueue.storage.objects.ObjectStore`) | is there for every machine |

| of two that `create` one name … | |
|---|---|
| in a folder | one is refused, on all machines that share it; without hard links only as a rule |
| on a mount | one is refused on one machine; two machines may both be heard, and the mount renames one |
| in a store | one is refused by the store itself, on all machines |

So names that two writers may want at once are created, and what a mount takes has names that carry a hash. No reader
believes a content without one.

Paths are relative and have slashes. An error about one file is FileNotFoundError; any other OSError or StoreError
says that the place fails, and nothing about what is in it. Patience, retries and copies are not a backend's business.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mbqueue import files


@dataclass(frozen=True)
class Listed:
    """A blob as a listing shows it.

    Attributes:
        size: in bytes; -1 where asking for it takes long.
        tag: another one when the content is another; empty where that cannot be told.
        modified: in seconds since the epoch, by the clock of the place; 0 where asking for it takes long.
    """

    size: int
    tag: str
    modified: float


class Unreadable(FileNotFoundError):
    """Something of that name is there, and it is no blob: a link, a folder, a file of another program."""


class Blobs(Protocol):
    """A place with whole files under names."""

    @property
    def url(self) -> str:
        """Where it is, for people; without secrets."""

    def listed(self, folder: str) -> dict[str, Listed]:
        """Name in a folder → its entry in the listing, sorted; nothing when there is no folder.

        A store also lists what is in folders of it, by the rest of its path.
        """

    def read(self, path: str, *, at_most: int) -> bytes:
        """The bytes of a blob; of one with more than ``at_most``, one more than that.

        Raises:
            FileNotFoundError: when there is none that can be read.
        """

    def put(self, path: str, content: bytes) -> None:
        """Write a blob whose name belongs to this very content, be it there already or not."""

    def create(self, path: str, content: bytes) -> bool:
        """Write a blob that does not exist yet, by one quick try; False when there is one with another content.

        One with the same content is that of an earlier try whose answer was lost, so that of two writers must differ.
        """

    def remove(self, path: str) -> None:
        """Remove a blob; one that is gone already is no error."""

    def move(self, path: str, target: str) -> bool:
        """Give a blob another name; False when it is gone."""


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk, or one that the machines of a cluster share."""

    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def listed(self, folder: str) -> dict[str, Listed]:
        found = {}
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.is_file() and not entry.name.startswith(files.TEMP_PREFIX):
                        facts = entry.stat()
                        tag = f"{facts.st_ino}-{facts.st_mtime_ns}-{facts.st_size}"
                        found[entry.name] = Listed(facts.st_size, tag, facts.st_mtime)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return dict(sorted(found.items()))

    def read(self, path: str, *, at_most: int) -> bytes:
        with (self.root / path).open("rb") as stream:
            return stream.read(at_most + 1)

    def put(self, path: str, content: bytes) -> None:
        files.write_bytes(self.root / path, content)

    def create(self, path: str, content: bytes) -> bool:
        if files.create_bytes(self.root / path, content):
            return True
        return self.read(path, at_most=len(content)) == content

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def move(self, path: str, target: str) -> bool:
        try:
            (self.root / path).replace(self.root / target)
        except FileNotFoundError:
            return False
        return True

    def sweep(self, folder: str) -> None:
        """Remove what processes that died left half written. Only for the one process that writes there."""
        for path in (self.root / folder).glob(f"{files.TEMP_PREFIX}*"):
            path.unlink(missing_ok=True)

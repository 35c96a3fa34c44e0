"""Blobs: whole files under names, with one interface for a folder, a mount and an object store.

What each backend guarantees (tests/storage/test_blobs.py checks all of them):

| after `put`, the blob … | |
|---|---|
| in a folder (`Folder`) | survives a loss of power |
| on a mount (`mbqueue.storage.mounted.Drive`) | can be read by this machine, and by others once it is uploaded |
| in a store (`mbqueue.storage.objects.ObjectStore`) | can be read by every machine |

| when two writers `create` one name … | |
|---|---|
| in a folder | one is refused, on all machines that share it; without hard links, almost always |
| on a mount | one is refused on one machine; on two machines both may succeed, and the mount renames one |
| in a store | one is refused by the store itself, on all machines |

So use `create` for names that two writers may pick at once, and put a hash into names on a mount. Readers trust no
content without a hash.

Paths are relative, with slashes. A FileNotFoundError is about one file. Any other OSError, or a StoreError, means that
the place fails, and proves nothing about the files in it. Backends do not wait, retry or keep copies.
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
        size: in bytes; -1 if it is slow to get.
        tag: a value that changes with the content; empty if unknown.
        modified: in seconds since the epoch, by the clock of the place; 0 if it is slow to get.
    """

    size: int
    tag: str
    modified: float


class Unreadable(FileNotFoundError):
    """The name belongs to something other than a blob: a link, a folder, a file of another program."""


class Blobs(Protocol):
    """A place that stores whole files under names."""

    @property
    def url(self) -> str:
        """The address, for messages, without secrets."""

    def listed(self, folder: str) -> dict[str, Listed]:
        """The entries of a folder by name, sorted; empty if there is no such folder.

        A store also lists the files in subfolders, by their path below the folder.
        """

    def read(self, path: str, *, at_most: int) -> bytes:
        """The bytes of a blob, cut off after ``at_most`` + 1.

        Raises:
            FileNotFoundError: if there is no readable blob of that name.
        """

    def put(self, path: str, content: bytes) -> None:
        """Write a blob whose name belongs to this content, even if the blob exists."""

    def create(self, path: str, content: bytes) -> bool:
        """Write a new blob, in one quick attempt; False if a blob of that name with other content exists.

        A blob with the same content counts as an earlier attempt whose answer was lost, so two writers must write
        different bytes.
        """

    def remove(self, path: str) -> None:
        """Remove a blob if it exists."""

    def move(self, path: str, target: str) -> bool:
        """Rename a blob; False if it does not exist."""


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or on a cluster's shared file system."""

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
        """Remove half-written files of dead processes. Call this only where no other process writes to the folder."""
        for path in (self.root / folder).glob(f"{files.TEMP_PREFIX}*"):
            path.unlink(missing_ok=True)

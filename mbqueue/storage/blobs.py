"""Read and write whole files, called blobs, in a folder, on a mount or in an object store.

What each backend guarantees (tests/storage/test_blobs.py checks all of them):

| after `put`, the blob … | |
|---|---|
| in a folder (`Folder`) | survives a power failure |
| on a mount (`mbqueue.storage.mounted.Drive`) | can be read by this machine, and by others once it is uploaded |
| in a store (`mbqueue.storage.objects.ObjectStore`) | can be read by every machine |

| when two writers `create` the same name … | |
|---|---|
| in a folder | one fails, even on different machines; in rare cases, both may succeed if there are no hard links |
| on a mount | one fails on the same machine; on two machines, both may succeed, and the mount renames one file |
| in a store | one fails, even on different machines, because the store refuses it |

So use `create` for names that two writers may choose at the same time, and put a hash into names on a mount. Readers
check the hash of everything that they read.

Paths are relative and use slashes. A FileNotFoundError means that one file is missing. Any other OSError, or a
StoreError, means that the folder, mount or store itself has failed; its files may be intact. Backends do not wait,
retry or keep copies.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mbqueue import files


@dataclass(frozen=True)
class Listed:
    """The entry of a blob in a listing.

    Attributes:
        size: in bytes; -1 if reading the size would be slow.
        tag: a value that changes with the content; empty if unknown.
        modified: a Unix timestamp, by the clock of the storage; 0 if reading the time would be slow.
    """

    size: int
    tag: str
    modified: float


class Unreadable(FileNotFoundError):
    """The name belongs to something that mbqueue cannot read as a blob, such as a link or a folder."""


class Blobs(Protocol):
    """Storage that reads and writes whole files by name."""

    @property
    def url(self) -> str:
        """The address without secrets, as shown in messages."""

    def listed(self, folder: str) -> dict[str, Listed]:
        """The entries of a folder, keyed and sorted by name; empty if there is no such folder.

        A store also lists the files in subfolders, by their path below the folder.
        """

    def read(self, path: str, *, at_most: int) -> bytes:
        """Read a blob. Return at most ``at_most`` + 1 bytes, so that callers can detect a blob that is too large.

        Raises:
            FileNotFoundError: if there is no readable blob of that name.
        """

    def put(self, path: str, content: bytes) -> None:
        """Write a blob, even if it exists. Use `put` only if the name determines the content."""

    def create(self, path: str, content: bytes) -> bool:
        """Write a new blob, without retries. Return False if a blob with this name and different content exists.

        Also return True if the blob exists with the same content, because an earlier attempt may have written it. Two
        writers must never write the same bytes, because `create` would return True to both.
        """

    def remove(self, path: str) -> None:
        """Remove a blob if it exists."""

    def move(self, path: str, target: str) -> bool:
        """Rename a blob; return False if it does not exist."""


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
                        stat = entry.stat()
                        tag = f"{stat.st_ino}-{stat.st_mtime_ns}-{stat.st_size}"
                        found[entry.name] = Listed(stat.st_size, tag, stat.st_mtime)
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
        """Remove half-written files of dead processes.

        Make sure first that no other process is writing to the folder.
        """
        for path in (self.root / folder).glob(f"{files.TEMP_PREFIX}*"):
            path.unlink(missing_ok=True)

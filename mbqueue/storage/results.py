"""Check result files, and read them from a folder, a mount or an object store.

In a folder, `results.json` lists the result files. On a mount, a file next to the commits lists the result files. With
an object store, the job's row in the queue lists the result files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mbqueue import files
from mbqueue.storage.blobs import Blobs

LARGEST_RESULT = 1 << 30

# No listed name may point outside the results folder, because other programs can write to mounts and servers.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HASH_DIGITS = 16


class ResultFile(NamedTuple):
    """The name, size in bytes and SHA-256 in hex of a result file, as its job wrote the file."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> ResultFile:
        """Return the name, size and hash of a file.

        Raises:
            FileNotFoundError: if the file does not exist.
        """
        return cls(path.name, path.stat().st_size, files.sha256_of_file(path))

    @classmethod
    def all_in(cls, checksums: Mapping[str, Mapping[str, Any]]) -> list[ResultFile]:
        """The result files in ``checksums``, which maps names to ``size`` and ``sha256``.

        Unsafe files are skipped (see `is_safe`).
        """
        found = [cls(name, checksum["size"], checksum["sha256"]) for name, checksum in checksums.items()]
        return [file for file in found if file.is_safe]

    @property
    def checksum(self) -> dict[str, int | str]:
        """Size and SHA-256, as `results.json` and the queue store them."""
        return {"size": self.size, "sha256": self.sha256}

    @property
    def is_safe(self) -> bool:
        """Whether the file is safe to copy: its name stays inside the folder, and its size is plausible."""
        return bool(_NAME.fullmatch(self.name)) and 0 <= self.size <= LARGEST_RESULT

    @property
    def stored_name(self) -> str:
        """The file's name in the store, which is unique to the file's content."""
        return f"{self.sha256[:_HASH_DIGITS]}-{self.name}"

    def fits(self, content: bytes) -> bool:
        return len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256

    def is_whole(self, path: Path) -> bool:
        """Whether a local file has the size and hash of this result file."""
        try:
            return path.stat().st_size == self.size and files.sha256_of_file(path) == self.sha256
        except FileNotFoundError:
            return False

    def written_in(self, folder: Path) -> bytes:
        """Read the file from the folder in which its job wrote it, before the file is copied elsewhere.

        Raises:
            OSError: if the file has changed or is missing.
        """
        content = (folder / self.name).read_bytes()
        if not self.fits(content):
            raise OSError(None, "the file changed after its job wrote it", str(folder / self.name))
        return content

    def read(self, blobs: Blobs, path: str) -> bytes:
        """Read the file, and check its size and hash.

        Raises:
            FileNotFoundError: if the file does not exist, or has different content.
        """
        content = blobs.read(path, at_most=self.size)
        if not self.fits(content):
            raise FileNotFoundError(None, "the file does not match its listing", path)
        return content


def total_bytes(listed: Iterable[ResultFile]) -> int:
    return sum(file.size for file in listed)

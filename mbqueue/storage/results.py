"""Result files: check their bytes, and read them from any place for blobs.

Each place lists the files differently: `results.json` in a folder, a listing beside the commits on a mount, the job's
row in the queue with an object store. The check of a listed file, and of a copy, is the same everywhere and is defined
here.
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

# Listings come from mounts and servers that others write to, and no name may lead out of the results folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HASH_DIGITS = 16


class ResultFile(NamedTuple):
    """A result file as it was when a job wrote it; size in bytes, hash in hex."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> ResultFile:
        """Describe a file.

        Raises:
            FileNotFoundError: if the file does not exist.
        """
        return cls(path.name, path.stat().st_size, files.sha256_of_file(path))

    @classmethod
    def all_in(cls, facts: Mapping[str, Mapping[str, Any]]) -> list[ResultFile]:
        """The files of a mapping from names to ``size`` and ``sha256``, without those that have an unsafe name."""
        found = [cls(name, fact["size"], fact["sha256"]) for name, fact in facts.items()]
        return [file for file in found if file.is_safe]

    @property
    def facts(self) -> dict[str, int | str]:
        """Size and SHA-256, as `results.json` and the queue store them."""
        return {"size": self.size, "sha256": self.sha256}

    @property
    def is_safe(self) -> bool:
        """Whether the file's name stays within a folder and its size is possible."""
        return bool(_NAME.fullmatch(self.name)) and 0 <= self.size <= LARGEST_RESULT

    @property
    def hashed_name(self) -> str:
        """A file name that is unique to this content."""
        return f"{self.sha256[:_HASH_DIGITS]}-{self.name}"

    def fits(self, content: bytes) -> bool:
        """Whether these bytes are the file's."""
        return len(content) == self.size and hashlib.sha256(content).hexdigest() == self.sha256

    def is_whole(self, path: Path) -> bool:
        """Whether a local file has the same bytes."""
        try:
            return path.stat().st_size == self.size and files.sha256_of_file(path) == self.sha256
        except FileNotFoundError:
            return False

    def written_in(self, folder: Path) -> bytes:
        """The file's bytes in the folder where the job wrote it, to be sent to another place.

        Raises:
            OSError: if the bytes have changed since, or the file is missing.
        """
        content = (folder / self.name).read_bytes()
        if not self.fits(content):
            raise OSError(None, "the file changed after its job wrote it", str(folder / self.name))
        return content

    def read(self, blobs: Blobs, path: str) -> bytes:
        """The file's bytes, read from a place.

        Raises:
            FileNotFoundError: if the place has no such file, or only one with other bytes.
        """
        content = blobs.read(path, at_most=self.size)
        if not self.fits(content):
            raise FileNotFoundError(None, "it does not match its listing", path)
        return content


def total_bytes(listed: Iterable[ResultFile]) -> int:
    """The total size of the files."""
    return sum(file.size for file in listed)

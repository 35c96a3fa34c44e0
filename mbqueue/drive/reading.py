"""Read files from a mount without trusting them: they may be truncated, or written by another program."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import TypeVar

from mbqueue.errors import MbqueueError
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import DUPLICATE

#: Errors that parsing may raise if another program or another version of mbqueue wrote the file.
NOT_OURS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MbqueueError)

Parsed = TypeVar("Parsed")


def what_is_wrong(error: Exception) -> str:
    """Describe why a file cannot be used, from the error that parsing the file raised."""
    return f"it lacks the key {error}" if isinstance(error, KeyError) else str(error)


class Reader:
    """Reads files with known hashes, and reports each damaged file once.

    Incomplete files are kept and checked again next time, since their upload may still be running.

    Args:
        on_damaged: called with the path of a damaged file and the reason.
    """

    def __init__(self, drive: Drive, on_damaged: Callable[[str, str], None]) -> None:
        self._drive, self._on_damaged = drive, on_damaged
        self._told: set[str] = set()

    def tell(self, path: str, why: str) -> None:
        """Report a damaged file, once."""
        if path not in self._told:
            self._told.add(path)
            self._on_damaged(path, why)

    def parsed(self, path: str, digits: str, parse: Callable[[bytes], Parsed], *, at_most: int) -> Parsed | None:
        """Parse a file whose SHA-256 begins with ``digits``; report it and return None if it is damaged.

        Raises:
            OSError: if the mount fails.
        """
        try:
            content = self._drive.read(path, at_most=at_most)
            if not hashlib.sha256(content).hexdigest().startswith(digits):
                raise ValueError("it is cut off or damaged: its content does not match its name")
            return parse(content)
        except FileNotFoundError as error:
            self.tell(path, str(error))
        except NOT_OURS as error:
            self.tell(path, what_is_wrong(error))
        return None

    def whole(self, base: str, suffix: str, *, size: int, sha256: str, what: str) -> bytes | None:
        """Read a file, or an intact copy that the drive renamed to `name (1)`.

        If there is no intact copy, report ``base`` and return None.

        Args:
            base: path without the suffix.
            what: a name for the content, for messages.

        Raises:
            OSError: if the mount fails.
        """
        why = f"its {what} is missing"
        folder, _, name = base.rpartition("/")
        pattern = re.compile(re.escape(name) + DUPLICATE + re.escape(suffix))
        for candidate in filter(pattern.fullmatch, self._drive.names(folder)):
            try:
                content = self._drive.read(f"{folder}/{candidate}", at_most=size)
            except FileNotFoundError as error:
                why = str(error)
                continue
            if len(content) == size and hashlib.sha256(content).hexdigest() == sha256:
                return content
            why = f"{candidate} is cut off or damaged ({len(content)} of {size} bytes)"
        self.tell(base, why)
        return None

"""Read files from a mount without trusting them: they may be truncated, or written by another program."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from mbqueue.errors import MbqueueError
from mbqueue.storage.mounted import Drive
from mbqueue.storage.names import DUPLICATE, HASH_DIGITS

#: Errors that parsing may raise if another program or another version of mbqueue wrote the file.
NOT_OURS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MbqueueError)
#: The largest accepted listing, in bytes.
LARGEST_LISTING = 16 << 20

Parsed = TypeVar("Parsed")


def what_is_wrong(error: Exception) -> str:
    """Describe why a file cannot be used, from the error that parsing the file raised."""
    return f"it lacks the key {error}" if isinstance(error, KeyError) else str(error)


class Listings(Generic[Parsed]):
    """Reads the listings on a mount, and reports each damaged file once.

    A listing is a JSON file named by `mbqueue.storage.names.hashed_name`. Damaged listings are kept and read again next
    time, because their upload may not be complete.

    Args:
        stem: regular expression for a listing's name without its hash. Other files are ignored.
        parse: checks the JSON value in the file with the given path, and converts it.
        on_damaged: called with the path of a damaged file and the reason.
    """

    def __init__(
        self, drive: Drive, stem: str, parse: Callable[[Any, str], Parsed], on_damaged: Callable[[str, str], None]
    ) -> None:
        self._drive, self._parse, self._on_damaged = drive, parse, on_damaged
        self._name = re.compile(rf"(?P<base>(?:{stem})-(?P<digits>[0-9a-f]{{{HASH_DIGITS}}})){DUPLICATE}\.json")
        self._known: dict[str, dict[str, Parsed]] = {}
        self._told: set[str] = set()

    def listed(self, folder: str) -> dict[str, Parsed]:
        """Every intact listing in a folder, by path without suffix, sorted.

        Raises:
            OSError: if the mount fails.
        """
        known, found = self._known.get(folder, {}), dict[str, Parsed]()
        for match in filter(None, map(self._name.fullmatch, self._drive.names(folder))):
            base = f"{folder}/{match['base']}"
            listing = found.get(base) or known.get(base) or self._read(f"{folder}/{match[0]}", match["digits"])
            if listing is not None:
                found[base] = listing
        self._known[folder] = found
        return dict(found)

    def remember(self, base: str, listing: Parsed) -> None:
        """Record a listing that was just written, so that it is not read again."""
        self._known.setdefault(base.rpartition("/")[0], {})[base] = listing

    def tell(self, path: str, why: str) -> None:
        """Report a damaged file, unless it has already been reported."""
        if path not in self._told:
            self._told.add(path)
            self._on_damaged(path, why)

    def _read(self, path: str, digits: str) -> Parsed | None:
        try:
            content = self._drive.read(path, at_most=LARGEST_LISTING)
            if not hashlib.sha256(content).hexdigest().startswith(digits):
                raise ValueError("it is cut off or damaged: its content does not match its name")
            return self._parse(json.loads(content), path)
        except FileNotFoundError as error:
            self.tell(path, str(error))
        except NOT_OURS as error:
            self.tell(path, what_is_wrong(error))
        return None

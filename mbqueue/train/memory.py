"""How many crystals go through a device at once: learned from running out of memory, and remembered."""

from __future__ import annotations

import json
from pathlib import Path

from mbqueue.files import write_json

#: More crystals than any batch has.
UNLIMITED = 1 << 20


class DeviceMemory:
    """The largest number of crystals per micro-batch that a device is known to bear, for one kind of work.

    Args:
        path: JSON file that remembers it for all experiments; None remembers nothing.
        key: the device and the kind of work, such as ``NVIDIA L4|train|all|float32``.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._key = key
        self.limit = int(self._read().get(key, UNLIMITED))

    def halve(self, failed: int) -> int:
        """Take half of a number of crystals that did not fit as the limit from now on, and remember it."""
        self.limit = min(self.limit, max(1, failed // 2))
        if self._path is not None:
            known = self._read()
            known[self._key] = self.limit
            write_json(self._path, known)
        return self.limit

    def _read(self) -> dict[str, int]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            # It is only a memory: without it, running out of memory once teaches the limit again.
            return {}
        return content if isinstance(content, dict) else {}

"""Read a mount that may hang at any moment, in threads that can be abandoned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mbqueue.belonging import answer_within
from mbqueue.storage.mounted import Drive

Answer = TypeVar("Answer")


class TimedDrive(Drive):
    """A read-only drive, with a time limit for reads.

    If a read finishes in an abandoned thread, its result is kept for the next attempt. A few attempts are therefore
    enough even if each read takes longer than the limit.

    Args:
        should_stop: reads end early once it returns True.
    """

    def __init__(self, drive: Drive, *, should_stop: Callable[[], bool]) -> None:
        super().__init__(drive.root)
        self._drive, self._should_stop = drive, should_stop
        self._seconds, self._until = 0.0, 0.0
        self._kept: dict[tuple[str, int], bytes] = {}

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Limit the total time of all reads in the block to ``seconds``.

        When the time is up, reads raise TimeoutError. After a request to stop, reads raise InterruptedError. If the
        mount fails, reads raise an OSError of a different class.
        """
        self._seconds, self._until = seconds, time.monotonic() + seconds
        yield
        self._kept.clear()

    def check(self) -> None:
        self._answer(self._drive.check)

    def names(self, folder: str) -> list[str]:
        return self._answer(lambda: self._drive.names(folder))

    def signature(self, path: str) -> tuple[int, int]:
        return self._answer(lambda: self._drive.signature(path))

    def read(self, path: str, *, at_most: int) -> bytes:
        key = path, at_most
        if key not in self._kept:
            self._answer(lambda: self._kept.__setitem__(key, self._drive.read(path, at_most=at_most)))
        return self._kept[key]

    def _answer(self, ask: Callable[[], Answer]) -> Answer:
        try:
            return answer_within(self._until - time.monotonic(), ask, should_stop=self._should_stop)
        except TimeoutError:
            raise TimeoutError(f"it has not answered within {self._seconds:.0f} s") from None

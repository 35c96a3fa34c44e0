"""Read the status of a project for all open pages at once, and only while a page is open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from mbqueue.api import Project, Status
from mbqueue.clock import Clock, format_duration
from mbqueue.errors import MbqueueError

#: Seconds for which pages reuse the last status before the board reads the queue again.
FRESH_SECONDS = 1.5
#: Seconds after which pages report that a read of the queue is slow.
PATIENCE_SECONDS = 5.0
#: After each read, the board waits at least this many times the duration of the read, so that it does not spend all its
#: time reading a large queue.
_REST = 10


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The outcome of the last read of the queue.

    Attributes:
        status: the project's status in the last successful read; None before the first one.
        trouble: why the last read failed; None if it succeeded.
    """

    status: Status | None
    trouble: str | None


class Reader:
    """Read a project's status for any number of threads, with at most one read at a time."""

    def __init__(self, project: Project, clock: Clock) -> None:
        self._look: Callable[[], Status] = project.status
        self._clock = clock
        self._busy = threading.Lock()
        self._reading = Reading(status=None, trouble=None)
        self._next_look = float("-inf")
        self._look_began = float("-inf")
        self._has_expired = False

    def read(self) -> Reading:
        """Return the current status or a recent one.

        If a read in another thread hangs, for example on an unreachable server, return the last status. If a read hangs
        for more than `PATIENCE_SECONDS`, the returned `Reading` reports the delay.
        """
        is_first = self._reading.status is None and self._reading.trouble is None
        if self._busy.acquire(blocking=is_first):
            try:
                if self._clock.monotonic() >= self._next_look:
                    self._renew()
            finally:
                self._busy.release()
        elif (waited := self._clock.monotonic() - self._look_began) > PATIENCE_SECONDS:
            return replace(self._reading, trouble=f"The queue has not answered for {format_duration(waited)}.")
        return self._reading

    def expire(self) -> None:
        """After the board has changed the queue, make sure that the next call to `read` queries the queue again."""
        self._has_expired = True
        self._next_look = float("-inf")

    def _renew(self) -> None:
        began = self._look_began = self._clock.monotonic()
        self._has_expired = False
        try:
            self._reading = Reading(status=self._look(), trouble=None)
        except (MbqueueError, OSError) as error:
            self._reading = Reading(status=self._reading.status, trouble=str(error) or type(error).__name__)
        ended = self._clock.monotonic()
        if not self._has_expired:  # the queue has not changed since this read began
            self._next_look = ended + max(FRESH_SECONDS, _REST * (ended - began))

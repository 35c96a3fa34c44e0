"""Measure and record how long publishing takes, so that a session starts to write only files that it can finish."""

from __future__ import annotations

from mbqueue.clock import format_duration
from mbqueue.queue.jobs import published_note
from mbqueue.queue.store import Queue


class RoundTimes:
    """Collects the durations of one session's publishing rounds, until they are recorded in the queue.

    The queue records the durations just before mbqueue takes a snapshot. Recording each round immediately would change
    the queue, which would trigger another snapshot and another round.
    """

    def __init__(self, session: str | None) -> None:
        self._session = session
        self._took: list[tuple[float, float]] = []

    def took(self, seconds: float, *, ended_at: float) -> None:
        """Add a publishing round that took ``seconds`` and ended at ``ended_at`` (a Unix timestamp)."""
        self._took.append((ended_at, seconds))

    def note(self, queue: Queue) -> None:
        """Record the collected durations in the queue; without a session, do nothing."""
        while self._took and self._session is not None:
            ended_at, seconds = self._took.pop(0)
            queue.note(published_note(seconds), by=self._session, now=ended_at)


#: Files with fewer bytes than this count as small. mbqueue measures the fixed time per file with small files, and the
#: time per byte with larger files.
SMALL_FILE = 1_000_000


class NoTime(Exception):
    """A file was not written, because the session would have ended before the write was complete."""


class WriteTime:
    """Estimates the time to write a file to the mount: a fixed time plus a time per byte."""

    def __init__(self) -> None:
        self._file_seconds = 0.0
        self._bytes_per_second: float | None = None

    def require(self, size: int, remaining: float) -> None:
        """Check that a file of ``size`` bytes can be written in the remaining seconds.

        Raises:
            NoTime: if writing the file would take longer than ``remaining``.
        """
        needed = self._file_seconds + (size / self._bytes_per_second if self._bytes_per_second else 0.0)
        if needed > remaining:
            raise NoTime(f"{size / 1e6:.1f} MB take {format_duration(needed)}")

    def learn(self, size: int, seconds: float) -> None:
        """Improve the estimate, given that a file of ``size`` bytes took ``seconds`` to write."""
        if size < SMALL_FILE:
            self._file_seconds = max(seconds, 0.8 * self._file_seconds)
        elif seconds > 0:
            rate = size / seconds
            self._bytes_per_second = rate if self._bytes_per_second is None else min(rate, self._bytes_per_second * 1.5)

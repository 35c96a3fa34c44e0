"""How long publishing takes: learned, so that nothing is begun for which there is no time, and noted in the queue."""

from __future__ import annotations

from mbqueue.clock import format_duration
from mbqueue.queue.jobs import published_note
from mbqueue.queue.store import Queue


class Rounds:
    """The rounds of one session that wrote something, kept until they are noted.

    They are noted when a snapshot is taken for another reason. A note at once would be news that asks for a snapshot,
    which asks for a round, which asks for a note.
    """

    def __init__(self, session: str | None) -> None:
        self._session = session
        self._took: list[tuple[float, float]] = []

    def took(self, seconds: float, *, ended_at: float) -> None:
        """A round ended at ``ended_at`` (seconds since the epoch) and took ``seconds``."""
        self._took.append((ended_at, seconds))

    def note(self, queue: Queue) -> None:
        """Write what is not noted yet; a command's rounds are not."""
        while self._took and self._session is not None:
            ended_at, seconds = self._took.pop(0)
            queue.note(published_note(seconds), by=self._session, now=ended_at)


#: The time that a smaller file takes says nothing of the time for each byte.
SMALL_FILE = 1_000_000


class NoTime(Exception):
    """A file was not begun, because it would not be written before the session's end."""


class Pace:
    """How long a file takes on this mount: so long in any case, and so long for each of its bytes."""

    def __init__(self) -> None:
        self._file_seconds = 0.0
        self._bytes_per_second: float | None = None

    def require(self, size: int, remaining: float) -> None:
        """Make sure that a file of so many bytes can be written in the seconds that remain.

        Raises:
            NoTime: when it cannot.
        """
        needed = self._file_seconds + (size / self._bytes_per_second if self._bytes_per_second else 0.0)
        if needed > remaining:
            raise NoTime(f"{size / 1e6:.1f} MB take {format_duration(needed)}")

    def learn(self, size: int, seconds: float) -> None:
        """A file of so many bytes took so long."""
        if size < SMALL_FILE:
            self._file_seconds = max(seconds, 0.8 * self._file_seconds)
        elif seconds > 0:
            rate = size / seconds
            self._bytes_per_second = rate if self._bytes_per_second is None else min(rate, self._bytes_per_second * 1.5)

"""How long publishing took, as notes in the queue: for the timeline of the report."""

from __future__ import annotations

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

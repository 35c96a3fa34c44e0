"""The queue: one class, built from parts that share a database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from mbqueue.queue.adopting import Adopting
from mbqueue.queue.commits_place import CommitsPlaces
from mbqueue.queue.database import Database, repeatable
from mbqueue.queue.enqueue import Enqueueing
from mbqueue.queue.leases import Leases
from mbqueue.queue.overview import Reports
from mbqueue.queue.pruning import Pruning
from mbqueue.queue.sessions import Sessions
from mbqueue.queue.sqlite import SqliteFile
from mbqueue.queue.steering import Steering


class Queue(Enqueueing, Leases, Sessions, Steering, Pruning, Reports, Adopting, CommitsPlaces):
    """The queue of a project: in a SQLite file (``state/queue.db``) on a local disk, or in another database.

    Any number of processes and threads may use it at once. Every method is one transaction: if it returns, its effect
    is on the disk; if it raises, nothing has changed. Time is always passed in (`now`, seconds since the epoch).

    Exclusion depends on clocks: a lease that was not renewed in time, by the clock of the next claimant, goes to
    another session. The former holder can then change nothing, since its fence is outdated. So a wrong clock can cause
    work to be done twice, but never a result to be written twice. On PostgreSQL there is only the server's clock.
    """

    def __init__(self, where: Path | Database, *, read_only: bool = False) -> None:
        super().__init__(where if isinstance(where, Database) else SqliteFile(where, read_only=read_only))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; the next use opens new ones."""
        self.database.close()

    @repeatable
    def verify(self) -> None:
        """Check that the database is intact.

        Raises:
            QueueError: if it is damaged.
        """
        self.database.verify()

    def wait(self, seconds: float, is_over: Callable[[float], bool]) -> None:
        """Wait for a new job to claim, as `Database.wait` does."""
        self.database.wait(seconds, is_over)

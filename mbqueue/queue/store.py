"""The queue: one class out of parts that share one database."""

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
from mbqueue.queue.sessions import Sessions
from mbqueue.queue.sqlite import SqliteFile
from mbqueue.queue.steering import Steering


class Queue(Enqueueing, Leases, Sessions, Steering, Reports, Adopting, CommitsPlaces):
    """The queue of a project: in a SQLite file (``state/queue.db``) on a local disk, or in another database.

    Any number of processes and threads may use it at once. Every method is one transaction: when it returns, its
    effect is on the disk; when it raises, it had none. Time is always passed in (`now`, seconds since the epoch).

    Exclusion ends where clocks disagree: a lease that its holder did not renew in time, by the clock of whoever
    claims next, is given away. The former holder can then change nothing (its fence is old), so a wrong clock
    costs work that is done twice, never a result that is written twice. On PostgreSQL there is one clock, the server's.
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
        """Close what is open; the next use opens it again."""
        self.database.close()

    @repeatable
    def verify(self) -> None:
        """Look whether the database is whole.

        Raises:
            QueueError: when it is damaged.
        """
        self.database.verify()

    def wait(self, seconds: float, is_over: Callable[[float], bool]) -> None:
        """Wait for something new to claim, as `Database.wait` says."""
        self.database.wait(seconds, is_over)

"""The queue: one class, built from parts that share a database."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from mbqueue.queue.adopting import Adopting
from mbqueue.queue.commits_place import CommitsPlaces
from mbqueue.queue.database import Database, repeatable
from mbqueue.queue.enqueueing import Enqueueing
from mbqueue.queue.leases import Leases
from mbqueue.queue.overview import Reports
from mbqueue.queue.pruning import Pruning
from mbqueue.queue.sessions import Sessions
from mbqueue.queue.sqlite import SqliteFile
from mbqueue.queue.steering import Steering


class Queue(Enqueueing, Leases, Sessions, Steering, Pruning, Reports, Adopting, CommitsPlaces):
    """The queue of a project, in a local SQLite file (``state/queue.db``) or in a schema on a PostgreSQL server.

    Any number of processes and threads may use the queue at once. Every method is one transaction: when the method
    returns, its changes are on the disk, and if it raises, nothing has changed. Callers pass the time as `now`, a
    Unix timestamp.

    The session that makes the next claim decides by its own clock whether a lease has expired. Once a job has been
    claimed again, the previous holder's fence is outdated, so the holder can no longer change the job. So a wrong clock
    can cause work to be done twice, but never a result to be written twice. On PostgreSQL, only the server's clock
    counts.
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
        self.database.close()

    @repeatable
    def verify(self) -> None:
        """Check that the database is intact.

        Raises:
            QueueError: if the database is damaged.
        """
        self.database.verify()

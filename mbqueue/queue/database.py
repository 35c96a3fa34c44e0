"""The database interface that the queue uses: transactions, statements, rows, and a way to wait for changes.

Most statements use only SQL that both SQLite and PostgreSQL understand. `mbqueue.queue.dialect` defines the SQL that
differs between the two databases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

from mbqueue.queue.dialect import Dialect, Sql

Parameters = Mapping[str, Any] | Sequence[Any]
Bound = tuple[Sql, Parameters]
Result = TypeVar("Result")
Method = TypeVar("Method", bound=Callable[..., Any])


class Row(Protocol):
    """One row, indexed by column name."""

    def __getitem__(self, key: str, /) -> Any: ...

    def keys(self) -> Any: ...


class Rows(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int:
        """The number of rows that the statement changed."""
        ...

    def fetchone(self) -> Any:
        """The next row, or None."""
        ...

    def fetchall(self) -> list[Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class Statements(Protocol):
    """An open transaction in which statements can run."""

    def execute(self, statement: Sql, parameters: Parameters = ..., /) -> Rows:
        """Run one statement with named (``:name``) or positional (``?``) parameters."""
        ...

    def executemany(self, statement: Sql, parameters: Iterable[Parameters], /) -> Any:
        """Run one statement for each of many sets of parameters."""
        ...


class Database(ABC):
    """A database that contains one queue. Any number of threads and processes may use the database at once.

    Attributes:
        name: where the database is, as shown in messages; never includes a password.
        file: the SQLite file; None on a server.
    """

    name: str
    file: Path | None = None
    dialect: ClassVar[Dialect]

    @abstractmethod
    def writing(self) -> AbstractContextManager[Statements]:
        """Open a write transaction, which is committed when the block ends and rolled back if the block raises."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Statements]:
        """Open a read transaction, in which all statements see the same state of the database."""

    def attempt(self, call: Callable[[], Result]) -> Result:
        """Run ``call``, and retry it if one of its transactions was aborted before it changed anything."""
        return call()

    @abstractmethod
    def close(self) -> None:
        """Close this process's connections in all threads. The next transaction opens a new connection."""

    @abstractmethod
    def verify(self) -> None:
        """Raise QueueError if the database is damaged."""

    @abstractmethod
    def instant(self, db: Statements, now: float) -> float:
        """The value of ``:now`` in this transaction, as a Unix timestamp: the caller's time or the server's."""

    def together(self, db: Statements, statements: Sequence[Bound]) -> list[Rows]:
        """Run several statements in order, in one message to a server; return the result of each."""
        return [db.execute(statement, parameters) for statement, parameters in statements]

    @abstractmethod
    def holding(self, experiment_id: int | None, *, shared: bool = False) -> Sequence[Bound]:
        """The statement that locks an experiment and its jobs until the transaction ends.

        A shared lock blocks only exclusive locks. If ``experiment_id`` is None, the statement locks the list of
        experiments. Every transaction locks an experiment before it changes the experiment's jobs, which prevents
        deadlocks.
        """

    @abstractmethod
    def leases_run_out(self, db: Statements) -> bool:
        """Whether expired leases may be reclaimed now."""

    @abstractmethod
    def wait(self, seconds: float, is_over: Callable[[float], bool]) -> None:
        """Wait until there may be a new job to claim, or until ``is_over(seconds)`` returns True.

        ``is_over`` sleeps for the given number of seconds. If the database cannot announce changes, `wait` calls
        ``is_over(seconds)`` only once.
        """


def repeatable(method: Method) -> Method:
    """Mark a public method of the queue as one transaction, which is retried if it was aborted.

    A retried transaction sees the changes that other sessions made in the meantime, and refuses an outdated fence.
    `publish` is called only once, even if the transaction is retried. During `publish`, the session holds the lease,
    and the job's row is locked. So the files that `publish` moves stay valid, even if another session claims the job
    between two attempts of the transaction.
    """

    @wraps(method)
    def call(self: Part, *args: Any, **options: Any) -> Any:
        if options.get("publish") is not None:
            options["publish"] = _once(options["publish"])
        return self.database.attempt(partial(method, self, *args, **options))

    return cast("Method", call)


def _once(publish: Callable[[], None]) -> Callable[[], None]:
    is_done = False

    def call() -> None:
        nonlocal is_done
        if not is_done:
            publish()
            is_done = True

    return call


class Part:
    """The base class of the queue's parts."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.writing, self.reading = database.writing, database.reading

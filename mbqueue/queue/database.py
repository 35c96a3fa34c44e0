"""What the queue asks of a database, whichever it is: transactions, statements, rows, waiting for news.

Statements are written once, in the SQL that SQLite and PostgreSQL share; `mbqueue.queue.dialect` has the words in which
they differ.
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
#: A statement and what is filled in.
Bound = tuple[Sql, Parameters]
Result = TypeVar("Result")
Method = TypeVar("Method", bound=Callable[..., Any])


class Row(Protocol):
    """One row: its values by column name."""

    def __getitem__(self, key: str, /) -> Any: ...

    def keys(self) -> Any:
        """The names of the columns."""
        ...


class Rows(Protocol):
    """What a statement gave."""

    @property
    def rowcount(self) -> int:
        """How many rows it changed."""
        ...

    def fetchone(self) -> Any:
        """The next row, or None."""
        ...

    def fetchall(self) -> list[Any]:
        """The rows that are left."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Statements(Protocol):
    """An open transaction: what runs statements in it."""

    def execute(self, statement: Sql, parameters: Parameters = ..., /) -> Rows:
        """Run one statement with named (``:name``) or positional (``?``) parameters."""
        ...

    def executemany(self, statement: Sql, parameters: Iterable[Parameters], /) -> Any:
        """Run one statement for each of many sets of parameters."""
        ...


class Database(ABC):
    """One database that holds a queue. Any number of threads and processes may use it at once.

    Attributes:
        name: where it is, for messages; never with a password.
        file: the SQLite file; None on a server.
    """

    name: str
    file: Path | None = None
    dialect: ClassVar[Dialect]

    @abstractmethod
    def writing(self) -> AbstractContextManager[Statements]:
        """A write transaction: committed when the block ends, undone when it raises."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Statements]:
        """A read transaction: all statements of the block see the same instant."""

    def attempt(self, call: Callable[[], Result]) -> Result:
        """What a call gives that is one transaction, or some; done again when it was interrupted and did nothing."""
        return call()

    @abstractmethod
    def close(self) -> None:
        """Close the connections of all threads of this process; the next use opens new ones."""

    @abstractmethod
    def verify(self) -> None:
        """Raise QueueError when the database is found to be damaged."""

    @abstractmethod
    def instant(self, db: Statements, now: float) -> float:
        """The time that ``:now`` stands for in this transaction: the caller's, or that of the database's server."""

    def together(self, db: Statements, statements: Sequence[Bound]) -> list[Rows]:
        """Run several statements, one after the other, in one message where there is a server; what each gave."""
        return [db.execute(statement, parameters) for statement, parameters in statements]

    @abstractmethod
    def holding(self, experiment_id: int | None, *, shared: bool = False) -> Sequence[Bound]:
        """What keeps others from changing an experiment and what its jobs need, until the transaction ends.

        Holders that share it exclude only those that do not. None holds the list of experiments itself. Whoever holds
        an experiment does so before he changes any job of it, so that no two transactions wait for each other.
        """

    def hold(self, db: Statements, experiment_id: int | None, *, shared: bool = False) -> None:
        """Do what `holding` says."""
        self.together(db, self.holding(experiment_id, shared=shared))

    @abstractmethod
    def leases_run_out(self, db: Statements) -> bool:
        """Whether a lease that was not renewed in time may be taken back now."""

    @abstractmethod
    def wait(self, seconds: float, is_over: Callable[[float], bool]) -> None:
        """Wait until there may be something new to claim, or ``is_over``, which waits so many seconds, gives True.

        ``seconds`` is how long to wait where nobody tells of news.
        """


def repeatable(method: Method) -> Method:
    """Marks a public method of the queue: it is one transaction, and is begun anew when that is interrupted.

    It sees what others did meanwhile then, and a fence that has become old is refused as ever. What it is given as
    `publish` is called once, however often that happens: it ran while the lease was held and the job's row was locked,
    so what it published is legitimate, also when another takes the job then.
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
    """What the parts of the queue stand on."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.writing, self.reading = database.writing, database.reading

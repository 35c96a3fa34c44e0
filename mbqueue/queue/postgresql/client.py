"""Connections to the server, their transactions, and what the server's errors mean."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from psycopg import ClientCursor, Connection, Cursor, errors
from psycopg.rows import dict_row

from mbqueue.errors import ForbiddenTransition, QueueError, first_line
from mbqueue.queue.database import Bound, Parameters, Rows
from mbqueue.queue.dialect import Sql
from mbqueue.queue.postgresql.address import Address
from mbqueue.queue.postgresql.parameters import for_psycopg

#: How long to wait for the server's answer. If the server, the pooler or a disk hangs, the connection stays open, so
#: only this limit ends the wait. Waits for locks are shorter (`mbqueue.queue.postgresql.server.LOCK_SECONDS`).
ANSWER_SECONDS = 90.0

#: Errors after which the server has ended the connection, or accepts no more writes on it.
_LOST = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.IdleInTransactionSessionTimeout,
    errors.ReadOnlySqlTransaction,
    errors.TooManyConnections,
)
#: Errors that roll back the whole transaction, so that it can be retried.
_CONFLICTS = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable)
Result = TypeVar("Result")
_REMEDIES: dict[type[psycopg.Error], str] = {
    errors.InsufficientPrivilege: " This role lacks a privilege. docs/how-to/many-machines.md lists the rights that "
    "sessions need. Only the owner of the tables can move a queue (migrate-queue).",
    errors.UndefinedTable: " The schema no longer contains a queue. Check schema= in the URL, or restore the database.",
    errors.DiskFull: " The server's disk is full. Free some space on the server.",
}


class Interrupted(QueueError):
    """The transaction was aborted. It changed nothing, and can be retried."""


@dataclass
class Client:
    """One thread's connection to the server; ``name`` and ``number`` identify the thread's transactions.

    Attributes:
        name: the name that the server shows for the client's transactions, and the key of the client's row in
            `receipts`.
        pid: the process that owns the connection.
        number: the number of the connection's latest write transaction.
        is_orphaned: whether the server may still have a transaction open for a lost connection.
        openings: the statements that begin write (True) and read (False) transactions.
    """

    name: str = field(default_factory=lambda: f"mbqueue {secrets.token_hex(8)}")
    pid: int = field(default_factory=os.getpid)
    number: int = 0
    connection: Connection[Any] | None = None
    is_orphaned: bool = False
    openings: Mapping[bool, str] | None = None

    def lose(self) -> None:
        """Drop the connection in the middle of a transaction, which may still be open on the server."""
        self.drop()
        self.is_orphaned = True

    def drop(self) -> None:
        if self.connection is not None:
            with suppress(psycopg.Error):
                self.connection.close()
        self.connection = None

    def has_lost(self, error: psycopg.Error) -> bool:
        """Whether an error means that the connection is unusable."""
        return self.connection is None or self.connection.closed or isinstance(error, _LOST)


class Given:
    """The result of one of several statements that were sent in one message."""

    def __init__(self, cursor: Cursor[Any]) -> None:
        self.rowcount = cursor.rowcount
        self._rows = iter(cursor.fetchall() if cursor.description else [])

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return self._rows


def _answers(cursor: Cursor[Any]) -> list[Rows]:
    given: list[Rows] = []
    while True:
        given.append(Given(cursor))
        if not cursor.nextset():
            return given


class Transaction:
    """A transaction that begins on the server when the first statement is sent.

    Args:
        opening: the text of the statements that begin the transaction.
        first: the statements after ``opening``. The last statement returns ``now`` (when the transaction began) and
            ``up_since`` (when the server started).
        server_clock: whether ``:now`` in a statement is the server's time instead of the caller's.
    """

    def __init__(
        self,
        connection: Connection[Any],
        opening: str,
        first: Sequence[Bound],
        *,
        server_clock: bool,
    ) -> None:
        self._connection, self._opening, self._first = connection, opening, first
        self._server_clock = server_clock
        self._times: Any = None

    @property
    def is_begun(self) -> bool:
        return self._times is not None

    @property
    def now(self) -> float | None:
        """The server's time when the transaction began, as a Unix timestamp; None without ``server_clock``."""
        return float(self._begun()["now"]) if self._server_clock else None

    @property
    def up_since(self) -> float:
        """When the server started, as a Unix timestamp."""
        return float(self._begun()["up_since"])

    def execute(self, statement: Sql, parameters: Parameters = (), /) -> Rows:
        return self.together([(statement, parameters)])[0]

    def together(self, statements: Sequence[Bound]) -> list[Rows]:
        """Run several statements in one message; return the result of each."""
        return self._sent(statements) if statements else []

    def executemany(self, statement: Sql, parameters: Iterable[Parameters], /) -> None:
        """Run one statement for each of many sets of parameters, in one message."""
        self._begun()
        cursor = ClientCursor(self._connection)
        if statements := [self._text(cursor, statement, one) for one in parameters]:
            self._connection.execute(";".join(statements).encode())

    def _begun(self) -> Any:
        if self._times is None:
            self._sent([])
        return self._times

    def _sent(self, statements: Sequence[Bound]) -> list[Rows]:
        is_first = self._times is None
        cursor = ClientCursor(self._connection, row_factory=dict_row)
        texts = [self._text(cursor, *bound) for bound in ([*self._first, *statements] if is_first else statements)]
        cursor.execute(";".join([self._opening, *texts] if is_first else texts).encode())
        answers = _answers(cursor)
        asked = len(answers) - len(statements)
        if is_first:
            self._times = answers[asked - 1].fetchone()
        return answers[asked:]

    def _text(self, cursor: ClientCursor[Any], statement: Sql, parameters: Parameters) -> str:
        values = (
            {name: _storable(value) for name, value in parameters.items()}
            if isinstance(parameters, Mapping)
            else [_storable(value) for value in parameters]
        )
        return cursor.mogrify(for_psycopg(statement, server_clock=self._server_clock), values)


class LimitedConnection(Connection[Any]):
    """A connection that closes itself if the server does not answer within `ANSWER_SECONDS`."""

    def wait(self, gen: Generator[Any, Any, Result], *args: Any, **options: Any) -> Result:
        """Wait as psycopg does, for at most `ANSWER_SECONDS`.

        Raises:
            OperationalError: if the server did not answer in time; the sent statements may still take effect.
        """
        return super().wait(self._limited(gen), *args, **options)

    def _limited(self, gen: Generator[Any, Any, Result]) -> Generator[Any, Any, Result]:
        end = time.monotonic() + ANSWER_SECONDS
        try:
            awaited = next(gen)
            while True:
                ready = yield awaited
                if not ready and time.monotonic() > end:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"no answer within {ANSWER_SECONDS:g} s")
                awaited = gen.send(ready)
        except StopIteration as ended:
            result: Result = ended.value
            return result


def connect(address: Address) -> Connection[Any]:
    # The client inserts the values into the statements, so that one message can contain several statements.
    return LimitedConnection.connect(
        **address.options, autocommit=True, prepare_threshold=None, cursor_factory=ClientCursor, row_factory=dict_row
    )


def unreachable(name: str, error: psycopg.Error) -> QueueError:
    """Make the error for a queue that could not be opened."""
    if isinstance(error, errors.InsufficientPrivilege):
        return QueueError(
            f"This role cannot use {name} ({first_line(error)}). Only the owner of the tables creates and upgrades "
            "them. So run the first mbqueue enqueue as that role, and one after each upgrade of mbqueue. The owner "
            "needs CREATE on the database. docs/how-to/many-machines.md lists the rights of the other roles."
        )
    return QueueError(
        f"{name} cannot be reached or used ({first_line(error)}). Check that the server runs and accepts connections "
        "from this machine. Check the role, the password (~/.pgpass, PGPASSWORD) and the URL (MBQUEUE_QUEUE, "
        "mbqueue.toml)."
    )


def explained(name: str, error: psycopg.Error, client: Client) -> QueueError:
    """Translate an error in a transaction into an mbqueue error, and drop the connection if it was lost."""
    said = first_line(error)
    if client.has_lost(error):
        client.lose()
        return Interrupted(f"The connection to {name} was lost ({said}).")
    if "forbidden transition" in said:
        return ForbiddenTransition(f"{name}: {said}. Nothing was changed.")
    if isinstance(error, _CONFLICTS):
        return Interrupted(f"{name}: another transaction blocked this one ({said}). Nothing was changed.")
    remedy = next((remedy for kind, remedy in _REMEDIES.items() if isinstance(error, kind)), "")
    return QueueError(f"{name}: {said}. Nothing was changed.{remedy}")


def _storable(value: Any) -> Any:
    """Replace NUL and lone surrogates, which PostgreSQL cannot store in text."""
    if isinstance(value, str) and ("\x00" in value or not value.isascii()):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    return value

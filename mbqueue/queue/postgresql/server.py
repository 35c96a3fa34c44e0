"""Connections to the queue's PostgreSQL server, transactions, what its errors mean, and going on after a lost one."""

from __future__ import annotations

import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from psycopg import ClientCursor, Connection, errors, sql

from mbqueue.errors import ForbiddenTransition, QueueError
from mbqueue.queue.database import Database, Parameters, Rows, Statements
from mbqueue.queue.postgresql import schema
from mbqueue.queue.postgresql.address import parse_address
from mbqueue.queue.postgresql.dialect import translate
from mbqueue.queue.postgresql.listening import Listener
from mbqueue.queue.postgresql.rows import records

_log = logging.getLogger("mbqueue")
Result = TypeVar("Result")

#: How long a method goes on trying while the server is away.
PATIENCE_SECONDS = 300.0
#: Between two tries: doubled from the first to the last.
FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.05, 5.0
#: How long a statement waits for another's transaction before its own is begun anew.
LOCK_SECONDS = 30
#: After how long the server gives up a transaction whose worker is silent, and with it the lock on its job. A worker
#: that is frozen for longer just while it publishes finds its transaction gone when it wakes.
SILENCE_SECONDS = 300
#: So long after the server's start no lease is taken back: holders could not renew while it was away.
GRACE_SECONDS = 60.0

_BEGIN_WRITING = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SELECT set_config('search_path', {path}, true), set_config('application_name', {client}, true),
    set_config('lock_timeout', '{lock}s', true), set_config('idle_in_transaction_session_timeout', '{silence}s', true);
INSERT INTO receipts (client, number) VALUES ({client}, {number})
    ON CONFLICT (client) DO UPDATE SET number = excluded.number, at = now();
"""

_BEGIN_READING = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT set_config('search_path', {path}, true), set_config('idle_in_transaction_session_timeout', '{silence}s', true);
"""

_TIMES = """
SELECT CAST(extract(epoch FROM transaction_timestamp()) AS double precision) AS now,
    CAST(extract(epoch FROM pg_postmaster_start_time()) AS double precision) AS up_since
"""

_FORGET_OLD_RECEIPTS = "DELETE FROM receipts WHERE at < now() - interval '30 days';"

# A transaction of ours whose connection we lost: it will never be told to commit. While it is open, its backend bears
# our name, also behind a pooler.
_END_ORPHAN = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = {client} AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()
"""

# Both statements wait until a transaction that wrote the row is over.
_LAST_COMMITTED = """
INSERT INTO receipts (client, number) VALUES ({client}, 0) ON CONFLICT (client) DO NOTHING;
SELECT number FROM receipts WHERE client = {client} FOR UPDATE
"""

_COUNT_TRIGGERS = """
SELECT count(*) FROM pg_trigger
WHERE tgrelid IN (to_regclass('jobs'), to_regclass('sessions')) AND tgenabled = 'O' AND NOT tgisinternal
"""

# So that two transactions that change what jobs of an experiment need come one after the other.
_HOLD = "SELECT 1 FROM experiments WHERE id = ? FOR NO KEY UPDATE"
_HOLD_SHARED = "SELECT 1 FROM experiments WHERE id = ? FOR SHARE"
_HOLD_ALL = (
    "SELECT pg_advisory_xact_lock(hashtext('mbqueue'), CAST(CAST(to_regclass('experiments') AS oid) AS integer))"
)

#: Errors after which the server has ended the connection, or will take no more writes on it.
_LOST = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.IdleInTransactionSessionTimeout,
    errors.ReadOnlySqlTransaction,
    errors.TooManyConnections,
)
#: Errors that say: begin anew. Nothing was changed.
_CONFLICTS = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable)

_REMEDIES: dict[type[psycopg.Error], str] = {
    errors.InsufficientPrivilege: " This role lacks a right; docs/many-machines.md says which ones it needs.",
    errors.UndefinedTable: " There is no queue there any more. Look at schema= in the URL, or restore the database.",
    errors.DiskFull: " The server's disk is full; free some space there.",
}


class Interrupted(QueueError):
    """The transaction certainly changed nothing, and may be done again."""


@dataclass
class _Client:
    """One thread's connection, and what its transactions are known by."""

    name: str = field(default_factory=lambda: f"mbqueue {secrets.token_hex(8)}")
    pid: int = field(default_factory=os.getpid)
    number: int = 0
    connection: Connection[Any] | None = None
    is_orphaned: bool = False

    def drop(self) -> None:
        """Have no connection any more."""
        if self.connection is not None:
            with suppress(psycopg.Error):
                self.connection.close()
        self.connection = None


class _Transaction:
    """An open transaction; ``:now`` in its statements is the server's time, where that counts."""

    def __init__(self, connection: Connection[Any], now: float | None, up_since: float) -> None:
        self._connection, self.now, self.up_since = connection, now, up_since

    def execute(self, statement: str, parameters: Parameters = (), /) -> Rows:
        return self._connection.execute(translate(statement), self._filled(parameters))

    def executemany(self, statement: str, parameters: Iterable[Parameters], /) -> None:
        cursor, query = ClientCursor(self._connection), translate(statement)
        if statements := [cursor.mogrify(query, self._filled(one)) for one in parameters]:
            self._connection.execute(";".join(statements).encode())

    def _filled(self, parameters: Parameters) -> Parameters:
        if not isinstance(parameters, Mapping):
            return tuple(map(_storable, parameters))
        filled = {name: _storable(value) for name, value in parameters.items()}
        if self.now is not None and "now" in filled:
            filled["now"] = self.now
        return filled


class PostgresServer(Database):
    """A queue in a schema of a PostgreSQL database; every thread, and every process after a fork, has a connection.

    What is promised: a transaction that returned is on the server's disk, as safe as its ``fsync`` and
    ``synchronous_commit`` say, and is seen whole or not at all. There is one clock, the server's: ``:now`` is the time
    at which the transaction began there, whatever the caller passes.

    A connection that is lost is made again. A transaction that was cut off before its COMMIT was sent did nothing;
    whether a COMMIT that was sent took effect is read from the connection's row in ``receipts``, which each
    transaction writes. Nothing outlives a transaction on a connection (no prepared statements, settings or locks), so
    that a pooler may hand each transaction to another one.

    Args:
        server_clock: False takes the caller's time, for tests that move it.

    Raises:
        QueueError: when the server cannot be reached, or there is no queue (reading only).
        SchemaTooNew: when a newer mbqueue wrote it.
    """

    dialect = "postgresql"

    def __init__(self, url: str, *, read_only: bool = False, server_clock: bool = True) -> None:
        self._address = parse_address(url)
        self.name = self._address.shown
        self.read_only = read_only
        self._server_clock = server_clock
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[_Client] = []
        self._is_away = False
        self._listener = Listener(self._connect, self._address.schema)
        try:
            self._make_current()
        except psycopg.Error as error:
            raise self._explained(error) from error

    def close(self) -> None:
        with self._lock:
            for client in self._open:
                if client.pid == os.getpid():
                    client.drop()
            self._open.clear()
            self._local = threading.local()
        self._listener.close()

    def verify(self) -> None:
        """Look whether the triggers that hold everybody to the rules are all there."""
        with self.reading() as db:
            found = db.execute(_COUNT_TRIGGERS).fetchone()[0]
        if found != schema.TRIGGERS:
            raise QueueError(
                f"{self.name}: {schema.TRIGGERS - found} of the triggers that guard the queue are missing or disabled. "
                "Put them back: ALTER TABLE jobs ENABLE TRIGGER USER, or restore the database from its backup."
            )

    @contextmanager
    def writing(self) -> Iterator[Statements]:
        if self.read_only:
            raise QueueError(f"{self.name} was opened for reading; it cannot be written.")
        client = self._client()
        try:
            transaction = self._begin(client, writes=True)
            yield transaction
        except psycopg.Error as error:
            self._roll_back(client)
            raise self._explained(error, client) from error
        except BaseException:
            self._roll_back(client)
            raise
        self._commit(client)

    @contextmanager
    def reading(self) -> Iterator[Statements]:
        client = self._client()
        try:
            yield self._begin(client, writes=False)
        except psycopg.Error as error:
            raise self._explained(error, client) from error
        finally:
            self._roll_back(client)

    def instant(self, db: Statements, now: float) -> float:
        assert isinstance(db, _Transaction)
        return now if db.now is None else db.now

    def hold(self, db: Statements, experiment_id: int | None, *, shared: bool = False) -> None:
        if experiment_id is None:
            db.execute(_HOLD_ALL)
        else:
            db.execute(_HOLD_SHARED if shared else _HOLD, (experiment_id,))

    def leases_run_out(self, db: Statements) -> bool:
        assert isinstance(db, _Transaction)
        return db.now is None or db.now - db.up_since >= GRACE_SECONDS

    def wait(self, seconds: float, is_over: Callable[[float], bool]) -> None:
        if not self._listener.wait(is_over):
            is_over(seconds)

    def attempt(self, call: Callable[[], Result]) -> Result:
        """``call``, which may be one transaction, again and again until it is not interrupted.

        Raises:
            QueueError: when the server was away for too long.
        """
        end, delay = None, FIRST_DELAY_SECONDS
        while True:
            try:
                result = call()
            except Interrupted as interrupted:
                end = time.monotonic() + PATIENCE_SECONDS if end is None else end
                if time.monotonic() + delay > end:
                    raise QueueError(
                        f"{interrupted} It was tried again for {PATIENCE_SECONDS:.0f} s. What is committed is safe; "
                        "once the server answers, go on with: mbqueue work"
                    ) from interrupted
                if delay > 1.0 and not self._is_away:
                    self._is_away = True
                    _log.warning("%s Trying again for up to %.0f s.", interrupted, PATIENCE_SECONDS)
            else:
                if self._is_away:
                    self._is_away = False
                    _log.warning("%s answers again.", self.name)
                return result
            time.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, LONGEST_DELAY_SECONDS)

    def _client(self) -> _Client:
        client: _Client | None = getattr(self._local, "client", None)
        # A connection must not be carried across a fork: both processes would talk on it.
        if client is None or client.pid != os.getpid():
            client = _Client()
            self._local.client = client
            with self._lock:
                self._open.append(client)
        return client

    def _connect(self) -> Connection[Any]:
        # Values are filled in here, not sent apart: nothing is prepared, and several statements are one message.
        return psycopg.connect(
            **self._address.options,
            autocommit=True,
            prepare_threshold=None,
            cursor_factory=ClientCursor,
            row_factory=records,
        )

    def _connection(self, client: _Client) -> Connection[Any]:
        if client.connection is None or client.connection.closed:
            client.connection = self._connect()
            if client.is_orphaned:
                client.connection.execute(self._composed(_END_ORPHAN, client))
                client.is_orphaned = False
        if client.connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            raise QueueError("The queue was used inside one of its own transactions: `publish` may only move files.")
        return client.connection

    def _begin(self, client: _Client, *, writes: bool) -> _Transaction:
        connection = self._connection(client)
        text = _BEGIN_READING
        if writes:
            client.number += 1
            text = _BEGIN_WRITING + (_FORGET_OLD_RECEIPTS if client.number == 1 else "")
        cursor = connection.execute(self._composed(text + _TIMES, client))
        while cursor.nextset():
            pass
        (times,) = cursor.fetchall()
        return _Transaction(connection, times["now"] if self._server_clock else None, times["up_since"])

    def _commit(self, client: _Client) -> None:
        assert client.connection is not None
        try:
            client.connection.execute("COMMIT")
        except psycopg.Error as error:
            if not _is_lost(error, client):
                self._roll_back(client)
                raise self._explained(error, client) from error
            client.drop()
            client.is_orphaned = True
            if not self.attempt(lambda: self._is_committed(client)):
                raise Interrupted(f"The connection to {self.name} was lost before a change was committed.") from error

    def _is_committed(self, client: _Client) -> bool:
        """Whether the client's last transaction took effect; on return it is certainly over."""
        try:
            connection = self._connection(client)
            connection.execute(self._composed("BEGIN; SELECT set_config('search_path', {path}, true)", client))
            cursor = connection.execute(self._composed(_LAST_COMMITTED, client))
            while cursor.nextset():
                pass
            ((number,),) = cursor.fetchall()
            connection.execute("COMMIT")
        except psycopg.Error as error:
            self._roll_back(client)
            raise self._explained(error, client) from error
        return bool(number == client.number)

    def _roll_back(self, client: _Client) -> None:
        connection = client.connection
        if connection is None or connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            return
        try:
            connection.execute("ROLLBACK")
        except psycopg.Error:
            client.drop()
            client.is_orphaned = True

    def _composed(self, text: str, client: _Client) -> sql.Composed:
        path = sql.Identifier(self._address.schema).as_string(None)
        return sql.SQL(text).format(
            path=sql.Literal(f"{path}, pg_temp"),
            client=sql.Literal(client.name),
            number=sql.Literal(client.number),
            lock=sql.SQL(str(LOCK_SECONDS)),
            silence=sql.SQL(str(SILENCE_SECONDS)),
        )

    def _make_current(self) -> None:
        client = self._client()
        connection = self._connection(client)
        version = schema.version_of(connection, self._address.schema)
        schema.require_known(version, name=self.name)
        if version == schema.SCHEMA_VERSION:
            return
        if self.read_only and version == 0:
            raise QueueError(f"There is no queue at {self.name}. Enqueue an experiment first: mbqueue enqueue NAME")
        schema.upgrade(connection, self._address.schema, name=self.name)

    def _explained(self, error: psycopg.Error, client: _Client | None = None) -> QueueError:
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if client is None:
            return QueueError(
                f"{self.name} cannot be reached or used ({said}). Check that the server runs and takes connections "
                "from here, the role's name and password (~/.pgpass, PGPASSWORD), and the URL in MBQUEUE_QUEUE or "
                "mbqueue.toml."
            )
        if _is_lost(error, client):
            client.drop()
            client.is_orphaned = True
            return Interrupted(f"The connection to {self.name} was lost ({said}).")
        if "forbidden transition" in said:
            return ForbiddenTransition(f"{self.name}: {said}. Nothing was changed.")
        if isinstance(error, _CONFLICTS):
            return Interrupted(f"{self.name}: another transaction was in the way ({said}). Nothing was changed.")
        remedy = next((remedy for kind, remedy in _REMEDIES.items() if isinstance(error, kind)), "")
        return QueueError(f"{self.name}: {said}. Nothing was changed.{remedy}")


def _is_lost(error: psycopg.Error, client: _Client) -> bool:
    return client.connection is None or client.connection.closed or isinstance(error, _LOST)


def _storable(value: Any) -> Any:
    """Text without what PostgreSQL cannot hold: the character NUL and halves of surrogate pairs."""
    if isinstance(value, str) and ("\x00" in value or not value.isascii()):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    return value

"""The queue's PostgreSQL server: transactions, locks, one clock, and recovery from lost connections."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg
from psycopg import Connection, sql
from psycopg.pq import TransactionStatus

from mbqueue.errors import QueueError, QueueMissing
from mbqueue.queue.database import Bound, Database, Result, Rows, Statements
from mbqueue.queue.dialect import POSTGRESQL
from mbqueue.queue.moved_mark import MOVED_VERSION, moved_error
from mbqueue.queue.postgresql import schema
from mbqueue.queue.postgresql.address import parse_address
from mbqueue.queue.postgresql.client import Client, Interrupted, Transaction, connect, explained
from mbqueue.queue.postgresql.listening import Listener
from mbqueue.queue.postgresql.parameters import SERVER_NOW
from mbqueue.queue.postgresql.patience import Patience, Wait, reached
from mbqueue.queue.schema import SCHEMA_VERSION, require_known

#: How long a statement waits for a lock before its transaction starts over.
LOCK_SECONDS = 30
#: If a worker stays silent for this long, the server rolls back the worker's transaction, which releases the lock on
#: the job. A worker that is suspended for longer than this while it publishes loses its transaction.
SILENCE_SECONDS = 300
#: After the server starts, mbqueue waits this long before it releases expired leases. Sessions could not renew their
#: leases while the server was down.
GRACE_SECONDS = 60.0

# Sequential scans are off, because every statement finds its few rows through an index. Without statistics, as on a new
# queue, the planner might scan the whole table instead.
_BEGIN_WRITING = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SELECT set_config('search_path', {path}, true), set_config('application_name', {client}, true),
    set_config('enable_seqscan', 'off', true), set_config('lock_timeout', {lock}, true),
    set_config('idle_in_transaction_session_timeout', {silence}, true)
"""

_BEGIN_READING = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT set_config('search_path', {path}, true), set_config('idle_in_transaction_session_timeout', {silence}, true)
"""

_RECEIPT = """
INSERT INTO receipts (client, number) VALUES (?, ?)
    ON CONFLICT (client) DO UPDATE SET number = excluded.number, at = now()
"""

_TIMES = f"""
SELECT {SERVER_NOW} AS now, CAST(extract(epoch FROM pg_postmaster_start_time()) AS double precision) AS up_since
"""

_FORGET_OLD_RECEIPTS = "DELETE FROM receipts WHERE at < now() - interval '30 days'"

# Ends a transaction that this client left open on a lost connection, because nothing can commit it any more.
# Even behind a pooler, the backend has the client's name as long as the transaction is open.
_END_ORPHAN = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE application_name = {client} AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()
"""

# If an open transaction has written the client's row in `receipts`, the last two statements wait until that transaction
# ends.
_LAST_COMMITTED = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SELECT set_config('search_path', {path}, true), set_config('lock_timeout', {lock}, true);
INSERT INTO receipts (client, number) VALUES ({client}, 0) ON CONFLICT (client) DO NOTHING;
SELECT number FROM receipts WHERE client = {client} FOR UPDATE
"""

_COUNT_TRIGGERS = """
SELECT count(*) AS n FROM pg_trigger
WHERE tgrelid IN (to_regclass('jobs'), to_regclass('sessions')) AND tgenabled = 'O' AND NOT tgisinternal
"""

_HOLD = "SELECT 1 FROM experiments WHERE id = ? FOR NO KEY UPDATE"
_HOLD_SHARED = "SELECT 1 FROM experiments WHERE id = ? FOR SHARE"
_HOLD_ALL = (
    "SELECT pg_advisory_xact_lock(hashtext('mbqueue'), CAST(CAST(to_regclass('experiments') AS oid) AS integer))"
)


class PostgresServer(Database):
    """A queue in a schema of a PostgreSQL database.

    Each thread, and each process after a fork, opens its own connection. A committed transaction is on the server's
    disk, as durable as the settings ``fsync`` and ``synchronous_commit`` make it. Other connections see a transaction
    completely or not at all. Only the server's clock counts, so ``:now`` is the server's time at the start of the
    transaction, whatever time the caller passes.

    Lost connections are reopened. If a transaction is aborted before its COMMIT is sent, it changes nothing. Each
    write transaction updates its client's row in ``receipts``. If the connection is lost during COMMIT, the row in
    ``receipts`` shows whether the transaction took effect. Transactions leave no settings, locks or prepared statements
    on a connection, so a pooler may give each transaction a different connection.

    Args:
        even_moved: also open a queue that was moved to a different database, so that the queue can be moved back.
        server_clock: whether to use the server's clock; tests set False to use the caller's time.
        wait: sleeps for the given number of seconds, and returns True to stop waiting for the server. Without ``wait``,
            an unreachable server raises an error immediately.

    Raises:
        QueueError: if the server cannot be reached, or if the queue does not exist and ``read_only`` is set.
        SchemaTooNew: if a newer mbqueue wrote the queue.
        QueueMoved: if the queue was moved to a different database.
    """

    dialect = POSTGRESQL

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        even_moved: bool = False,
        server_clock: bool = True,
        wait: Wait | None = None,
    ) -> None:
        self.even_moved = even_moved
        self.address = parse_address(url)
        self.name = self.address.shown
        self.read_only = read_only
        self._server_clock = server_clock
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[Client] = []
        self.patience = Patience(self.name)
        self._listener = Listener(partial(connect, self.address), self.address.schema)
        try:
            reached(self.address, self._make_current, wait)
        except BaseException:
            self.close()
            raise

    def attempt(self, call: Callable[[], Result]) -> Result:
        return self.patience.attempt(call)

    def close(self) -> None:
        with self._lock:
            for client in self._open:
                if client.pid == os.getpid():
                    client.drop()
            self._open.clear()
            self._local = threading.local()
        self._listener.close()

    def verify(self) -> None:
        """Check that all triggers exist and are enabled, because they enforce the rules."""

        with self.reading() as db:
            found = int(db.execute(_COUNT_TRIGGERS).fetchone()["n"])
        if found != schema.TRIGGERS:
            raise QueueError(
                f"{self.name}: {schema.TRIGGERS - found} of the triggers that guard the queue are missing or disabled. "
                "Enable the triggers with ALTER TABLE jobs ENABLE TRIGGER USER, or restore the database from a backup."
            )

    @contextmanager
    def writing(self) -> Iterator[Statements]:
        if self.read_only:
            raise QueueError(f"{self.name} was opened for reading only.")
        client = self._client()
        try:
            transaction = self._begin(client, writes=True)
            yield transaction
        except psycopg.Error as error:
            self._roll_back(client)
            raise explained(self.name, error, client) from error
        except BaseException:
            self._roll_back(client)
            raise
        if transaction.is_begun:
            self._commit(client)

    @contextmanager
    def reading(self) -> Iterator[Statements]:
        client = self._client()
        try:
            yield self._begin(client, writes=False)
        except psycopg.Error as error:
            raise explained(self.name, error, client) from error
        finally:
            self._roll_back(client)

    def instant(self, db: Statements, now: float) -> float:
        assert isinstance(db, Transaction)
        began = db.now
        return now if began is None else began

    def together(self, db: Statements, statements: Sequence[Bound]) -> list[Rows]:
        assert isinstance(db, Transaction)
        return db.together(statements)

    def holding(self, experiment_id: int | None, *, shared: bool = False) -> Sequence[Bound]:
        if experiment_id is None:
            return [(_HOLD_ALL, ())]
        return [(_HOLD_SHARED if shared else _HOLD, (experiment_id,))]

    def leases_run_out(self, db: Statements) -> bool:
        assert isinstance(db, Transaction)
        now = db.now
        return now is None or now - db.up_since >= GRACE_SECONDS

    def wait(self, seconds: float, is_over: Callable[[float], bool]) -> None:
        if not self._listener.wait(is_over):
            is_over(seconds)

    def _client(self) -> Client:
        client: Client | None = getattr(self._local, "client", None)
        # A forked process needs its own connection, because its parent still uses this one.
        if client is None or client.pid != os.getpid():
            client = Client()
            self._local.client = client
            with self._lock:
                self._open.append(client)
        return client

    def _connection(self, client: Client) -> Connection[Any]:
        if client.connection is None or client.connection.closed:
            client.connection = connect(self.address)
            if client.is_orphaned:
                client.connection.execute(self._composed(_END_ORPHAN, client))
                client.is_orphaned = False
        if client.connection.info.transaction_status != TransactionStatus.IDLE:
            raise QueueError("The queue was used inside one of its own transactions: `publish` may only move files.")
        return client.connection

    def _begin(self, client: Client, *, writes: bool) -> Transaction:
        connection = self._connection(client)
        first: list[Bound] = [(_TIMES, ())]
        if writes:
            client.number += 1
            first = [(_RECEIPT, (client.name, client.number)), *first]
            if client.number == 1:
                first = [(_FORGET_OLD_RECEIPTS, ()), *first]
        if client.openings is None:
            client.openings = {
                wanted: self._composed(text, client).as_string(connection)
                for wanted, text in ((True, _BEGIN_WRITING), (False, _BEGIN_READING))
            }
        return Transaction(connection, client.openings[writes], first, server_clock=self._server_clock)

    def _commit(self, client: Client) -> None:
        assert client.connection is not None
        try:
            client.connection.execute("COMMIT")
        except psycopg.Error as error:
            if not client.has_lost(error):
                self._roll_back(client)
                raise explained(self.name, error, client) from error
            client.lose()
            if not self.patience.attempt(lambda: self._is_committed(client)):
                raise Interrupted(f"The connection to {self.name} was lost before a change was committed.") from error

    def _is_committed(self, client: Client) -> bool:
        """Wait until the client's last transaction is over, and return whether it took effect."""
        try:
            connection = self._connection(client)
            cursor = connection.execute(self._composed(_LAST_COMMITTED, client))
            while cursor.nextset():
                pass
            (last,) = cursor.fetchall()
            connection.execute("COMMIT")
        except psycopg.Error as error:
            self._roll_back(client)
            raise explained(self.name, error, client) from error
        return bool(last["number"] == client.number)

    def _roll_back(self, client: Client) -> None:
        connection = client.connection
        if connection is None or connection.info.transaction_status == TransactionStatus.IDLE:
            return
        try:
            connection.execute("ROLLBACK")
        except psycopg.Error:
            client.lose()

    def _composed(self, text: str, client: Client) -> sql.Composed:
        return sql.SQL(text).format(
            path=sql.Literal(f"{sql.Identifier(self.address.schema).as_string(None)}, pg_temp"),
            client=sql.Literal(client.name),
            lock=sql.Literal(f"{LOCK_SECONDS}s"),
            silence=sql.Literal(f"{SILENCE_SECONDS}s"),
        )

    def _make_current(self) -> None:
        connection = self._connection(self._client())
        version = schema.version_of(connection, self.address.schema)
        if version == MOVED_VERSION:
            if self.even_moved:
                return
            raise moved_error(self.name, **schema.where_moved(connection, self.address.schema))
        require_known(version, name=self.name)
        if version == SCHEMA_VERSION:
            return
        if self.read_only and version == 0:
            raise QueueMissing(f"There is no queue at {self.name}. Enqueue an experiment first: mbqueue enqueue NAME")
        schema.upgrade(connection, self.address.schema, name=self.name)


def exists(url: str, *, wait: Wait | None = None) -> bool:
    """Whether there is a queue at a URL; ``wait`` as for `PostgresServer`.

    Raises:
        QueueError: if the server cannot be reached.
    """
    address = parse_address(url)

    def look() -> bool:
        with connect(address) as connection:
            return schema.version_of(connection, address.schema) > 0

    return reached(address, look, wait)

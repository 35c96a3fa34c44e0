"""The queue in one SQLite file: connections, transactions, and what SQLite's errors mean."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from mbqueue.clock import utc_text
from mbqueue.errors import ForbiddenTransition, QueueDamaged, QueueDiskFull, QueueError, QueueMissing, QueueReplaced
from mbqueue.files import fsync_dir, make_folder, unused
from mbqueue.limits import size_of_files
from mbqueue.queue import sqlite_schema
from mbqueue.queue.database import Bound, Database, Parameters, Statements
from mbqueue.queue.dialect import SQLITE, Sql, text_of
from mbqueue.queue.schema import SCHEMA_VERSION

#: How long a statement waits for a transaction of another process.
BUSY_SECONDS = 30.0
#: With less free disk space than this, SQLite cannot index its write-ahead log, and reports "I/O error".
_LEAST_ROOM_BYTES = 1 << 20
#: Small pages keep the log short: a commit changes only a few bytes in each of five pages, but logs whole pages.
_PAGE_BYTES = 2048

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNREACHABLE = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}


def settle(path: Path, *, busy_seconds: float = BUSY_SECONDS) -> None:
    """Write the write-ahead log into the database file, so that the file can be moved.

    Call `settle` only if no process has the database open. Closing the database would also write the log, but would
    hide a failure. Moving the database file without its write-ahead log would lose rows.

    Raises:
        QueueError: if the log cannot be written, for example because the disk is full. No data is lost.
    """
    try:
        with closing(sqlite3.connect(path, timeout=busy_seconds, isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = FULL")
            is_busy, *_ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        raise QueueError(
            f"Cannot merge the write-ahead log into {path} ({error}). If the disk is full, free some space, then try "
            "again."
        ) from error
    if is_busy:
        raise QueueError(f"{path} is in use by another process. End all sessions first: mbqueue stop")
    for suffix in ("-wal", "-shm", ".lock"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def set_aside(path: Path, why: str, *, now: float) -> Path:
    """Rename a SQLite file, its log and its index to ``queue.db.WHY-TIME``; return the new path."""
    aside = unused(path.with_name(f"{path.name}.{why}-{utc_text(now).replace(':', '')}"))
    for suffix in ("-wal", "-shm", ""):
        if (part := path.with_name(path.name + suffix)).exists():
            part.replace(aside.with_name(aside.name + suffix))
    fsync_dir(path.parent)
    return aside


class Transaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def execute(self, statement: Sql, parameters: Parameters = (), /) -> sqlite3.Cursor:
        return self.connection.execute(text_of(statement, SQLITE), parameters)

    def executemany(self, statement: Sql, parameters: Iterable[Parameters], /) -> None:
        self.connection.executemany(text_of(statement, SQLITE), parameters)


class SqliteFile(Database):
    """A SQLite file that contains one queue. Each thread, and each process after a fork, opens its own connection.

    A committed transaction is on the disk (``synchronous=FULL``), so it survives a crash of the process or the machine.
    Other connections see a transaction completely or not at all. The file must be on a local disk, because SQLite's
    locks and write-ahead log are unreliable on a network mount. If another file replaces the opened file, every later
    write fails.

    With ``read_only=True``, no transaction can write, and the file must exist. A database of an older version is
    upgraded even with ``read_only``. In a read-only folder, such as a backup, the file is opened as immutable.

    Raises:
        QueueError: if the file is locked for too long, or not writable; with ``read_only``, also if it is missing.
        QueueDamaged: if the file is damaged.
        QueueDiskFull: if the disk is full.
        QueueReplaced: if another file has replaced the opened file.
        SchemaTooNew: if a newer mbqueue wrote the file.
        QueueMoved: if the queue was moved to a different database.
    """

    dialect = SQLITE

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = self.file = Path(path)
        self.name = str(path)
        self.read_only = read_only
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[tuple[int, sqlite3.Connection]] = []
        self._file: tuple[int, int] | None = None
        if read_only and not self.path.exists():
            raise QueueMissing(f"There is no queue at {self.path}. Enqueue an experiment first: mbqueue enqueue NAME")
        try:
            with self._translating():
                self._make_current()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self._lock:
            for owner, connection in self._open:
                if owner == os.getpid():
                    connection.close()
            self._open.clear()
            self._local, self._file = threading.local(), None

    def verify(self) -> None:
        """Check the integrity of the whole file. SQLite misses some damage, for example a changed digit.

        Raises:
            QueueDamaged: if the file is damaged.
        """
        with self.reading() as db:
            found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            # SQLite accepts any definition that it can parse, so a flipped bit could rename a column.
            there = sqlite_schema.definitions(db.connection)
            if found == "ok" and there != sqlite_schema.expected_definitions(SCHEMA_VERSION):
                found = "it does not have the tables of a queue"
        if found != "ok":
            raise self._damaged(found)

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """Open a write transaction, which locks the database at once."""
        with self._translating():
            connection = self._connection()
            _begin(connection, "BEGIN IMMEDIATE")
            try:
                self._require_same_file()
                yield Transaction(connection)
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        with self._translating():
            connection = self._connection()
            _begin(connection, "BEGIN")
            try:
                yield Transaction(connection)
            finally:
                connection.rollback()

    def instant(self, _db: Statements, now: float) -> float:
        """Return the caller's time. All processes that use a SQLite queue run on one machine, so they share a clock."""
        return now

    def holding(self, _experiment_id: int | None, *, shared: bool = False) -> Sequence[Bound]:  # noqa: ARG002
        """Return no lock statement, because SQLite allows only one writer at a time."""
        return ()

    def leases_run_out(self, _db: Statements) -> bool:
        return True

    def wait(self, seconds: float, is_over: Callable[[float], bool]) -> None:
        """Wait for ``seconds``.

        SQLite does not announce changes, so the caller must check for new jobs after each wait.
        """
        is_over(seconds)

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        # A forked process needs its own connection, because otherwise both processes would hold the same locks.
        if connection is None or self._local.pid != os.getpid():
            connection = self._connect(read_only=self.read_only)
            self._local.connection, self._local.pid = connection, os.getpid()
            with self._lock:
                # Remember the file that was opened first, so that no thread writes to a file that has replaced it.
                self._file = self._file or _file_at(self.path)
                self._open.append((os.getpid(), connection))
        return connection

    def _require_same_file(self) -> None:
        if _file_at(self.path) != self._file:
            raise QueueReplaced(
                f"{self.path} is not the file that this process opened: the queue was replaced (mbqueue recover or "
                "restore). Nothing was written. Start again: mbqueue work"
            )

    def _connect(self, *, read_only: bool) -> sqlite3.Connection:
        mode = "rwc" if not read_only else "ro&immutable=1" if self._is_immutable() else "ro"
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # only close() uses another thread's connection
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        return connection

    def _is_immutable(self) -> bool:
        """Whether the file cannot change: its folder is not writable, and its write-ahead log is empty."""
        log = self.path.with_name(self.path.name + "-wal")
        return not os.access(self.path.parent, os.W_OK) and not (log.exists() and log.stat().st_size)

    def _make_current(self) -> None:
        if self.path.exists():
            connection = self._connection()
            has_log = connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal" or self._is_immutable()
            if has_log and sqlite_schema.is_current(connection, path=self.path):
                return
        from filelock import FileLock  # noqa: PLC0415  (needed only when there is something to create)

        make_folder(self.path.parent)
        # If several processes switch to the write-ahead log at once, SQLite ignores the busy timeout.
        with FileLock(self.path.with_name(self.path.name + ".lock"), timeout=BUSY_SECONDS):
            connection = self._connect(read_only=False)
            try:
                sqlite_schema.is_current(connection, path=self.path)
                connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # existing files keep their page size
                connection.execute("PRAGMA journal_mode = WAL")
                sqlite_schema.upgrade(connection, path=self.path)
            finally:
                connection.close()

    def _damaged(self, why: object) -> QueueDamaged:
        return QueueDamaged(
            f"{self.path} is damaged ({why}). Stop all workers. Rename this file and all files next to it whose names "
            f"begin with {self.path.name}. Then rebuild the queue from the checkpoints: mbqueue recover"
        )

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explained(error) from error
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def _explained(self, error: sqlite3.Error) -> QueueError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if "forbidden transition" in str(error):
            return ForbiddenTransition(f"{self.path}: {error}. Nothing was changed.")
        if code in _DAMAGED or "unsupported file format" in str(error):
            return self._damaged(error)
        if code in _BUSY:
            return QueueError(
                f"{self.path} was locked by another process for more than {BUSY_SECONDS:.0f} s ({error}). Find the "
                "suspended or hanging mbqueue process, resume or end it, and try again."
            )
        if code == sqlite3.SQLITE_FULL or (code in _UNREACHABLE and self._has_no_room()):
            return QueueDiskFull(
                f"The disk of {self.path} is full. Nothing was changed. Free some space on this disk. For example, "
                "`mbqueue cache prune --all` removes converted data, which the next session converts again."
            )
        if code in _UNREACHABLE or code == sqlite3.SQLITE_READONLY:
            limit = size_of_files()
            return QueueError(
                f"{self.path} cannot be opened or written ({error}). Check the disk, the folder and the permissions."
                + (f" This shell allows files of at most {limit} (ulimit -f)." if limit else "")
            )
        return QueueError(f"{self.path}: {error}. Nothing was changed.")

    def _has_no_room(self) -> bool:
        try:
            return shutil.disk_usage(self.path.parent).free < _LEAST_ROOM_BYTES
        except OSError:
            return False


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _begin(connection: sqlite3.Connection, statement: str) -> None:
    if connection.in_transaction:
        raise QueueError("The queue was used inside one of its own transactions: `publish` may only move files.")
    connection.execute(statement)

"""Copy a whole queue from one database into another, with unchanged rows, ids, fences and events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.errors import QueueError, QueueMoved, UsageError
from mbqueue.queue.database import Statements
from mbqueue.queue.dialect import POSTGRESQL, SQLITE
from mbqueue.queue.moved import empty_moved, mark_moved, version_before
from mbqueue.queue.schema import SCHEMA_VERSION
from mbqueue.queue.sessions import at_work
from mbqueue.queue.sqlite import set_aside, settle
from mbqueue.queue.store import Queue

_ROWS_AT_ONCE = 1000

#: The columns of a queue's tables. A table comes after the tables that its foreign keys refer to.
COLUMNS = {
    "experiments": "id, name, spec, spec_hash, results_dir, dataset, dataset_hash, priority, paused, enqueued_at",
    "sessions": "id, host, boot_id, pid, pid_started, device, started_at, heartbeat_at, alive_until, deadline_at, "
    "ended_at, end_reason, structures_per_second",
    "jobs": "id, experiment_id, kind, fold, epoch, state, priority, paused, started, fence, session_id, "
    "lease_expires_at, affinity, failures, preemptions, lost_in_a_row, not_before, enqueued_at, changed_at, "
    "changed_by, changed_why, progress, result, error, val_mae, test_mae, seconds",
    "needs": "job_id, needed_id",
    "events": "id, at, job_id, experiment_id, by, from_state, to_state, why",
    "commits_place": "id, number, kind, address, since, by",
}
_NUMBERED = ("experiments", "jobs", "events")
#: Finds the columns of a PostgreSQL table that hold fewer than 64 bits.
_NARROW = "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(?) AND atttypid = to_regtype('integer')"
_LARGEST_NARROW = 2**31 - 1

# Tries to lock a queue until the transaction ends. Each queue in a database has its own lock.
_ONE_MOVER = (
    "SELECT pg_try_advisory_xact_lock(hashtext('mbqueue moves'), "
    "CAST(CAST(to_regclass('experiments') AS oid) AS integer)) AS is_ours"
)


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """The outcome of copying a queue.

    Attributes:
        rows: the number of rows in each table.
        source, target: the addresses, without passwords.
    """

    rows: dict[str, int]
    source: str
    target: str


def rows_of(db: Statements, table: str) -> Iterator[tuple[Any, ...]]:
    """All rows of one table of a queue, in the same order in every database."""
    order = "job_id, needed_id" if table == "needs" else "id"
    query = f"SELECT {COLUMNS[table]} FROM {table} ORDER BY {order}"
    columns = COLUMNS[table].split(", ")
    return (tuple(row[column] for column in columns) for row in db.execute(query))


def copy_queue(source: Queue, target: Queue, *, now: float) -> Migrated:
    """Copy a queue into an empty one, and mark the source as moved (`mbqueue.queue.moved`).

    Before the commit, all copied rows are read back and compared. A target whose queue was moved away earlier counts as
    empty if the source contains all events of that queue. If an earlier run copied the queue but crashed before it
    marked the source, this run only marks the source.

    Raises:
        UsageError: if a session works with the source, or the target is not empty.
        QueueError: if the target cannot store a value unchanged. Neither queue is changed.
    """
    with source.writing() as old, target.writing() as new:  # the target's transaction commits first
        _require_another(source, old, target, new)
        _leave(source, old, target.database.name, now=now)
        if target.database.dialect is POSTGRESQL:
            _take_back(target, old, new)
        if _is_empty(new):
            _copy(old, target, new)
        elif _is_empty(old) or not _goes_on(new, after=old):
            raise UsageError(
                f"{target.database.name} is not empty. Use an empty database or schema, for example another "
                "schema=NAME."
            )
        counts = _counts(new)
    return Migrated(rows=counts, source=source.database.name, target=target.database.name)


def copy_to_file(source: Queue, path: Path, *, now: float) -> Migrated:
    """Copy a queue into a new SQLite file, as `copy_queue` does. The file appears only when it is complete.

    If the file at this path is a queue that was moved away, it is renamed to ``queue.db.moved-TIME``.

    Raises:
        UsageError: as for `copy_queue`; also if the file at this path is a queue that was not moved away.
    """
    if source.database.dialect is SQLITE:
        raise UsageError(f"The queue {source.database.name} is already in a file. Nothing was changed.")
    building = path.with_name(f"{files.TEMP_PREFIX}{path.name}")
    try:
        for left in path.parent.glob(f"{building.name}*"):
            left.unlink()
        with source.writing() as old:
            _leave(source, old, str(path), now=now)
            if not _is_copied(path, old):
                with Queue(building) as target, target.writing() as new:
                    _copy(old, target, new)
                settle(building)
                if path.exists():
                    settle(path)  # otherwise a crash between the renames could leave a file that is not marked as moved
                    set_aside(path, "moved", now=now)
                building.replace(path)
                files.fsync_dir(path.parent)
            counts = _counts(old)
    finally:
        for left in path.parent.glob(f"{building.name}*"):
            left.unlink()
    return Migrated(rows=counts, source=source.database.name, target=str(path))


def _require_another(source: Queue, old: Statements, target: Queue, new: Statements) -> None:
    """Refuse to move a queue onto itself, for example through a different spelling of its address."""
    if not source.database.dialect is target.database.dialect is POSTGRESQL:
        return
    if not (old.execute(_ONE_MOVER).fetchone()["is_ours"] and new.execute(_ONE_MOVER).fetchone()["is_ours"]):
        raise UsageError(
            f"{target.database.name} and {source.database.name} are the same queue, or another process is "
            "moving one of them right now. Nothing was changed."
        )


def _leave(source: Queue, old: Statements, target: str, *, now: float) -> None:
    """Mark the source as moved. The caller commits the mark after the target's transaction."""
    now = source.database.instant(old, now)
    if source.database.dialect is POSTGRESQL:
        old.execute(f"LOCK TABLE {', '.join(COLUMNS)} IN EXCLUSIVE MODE")
    live = at_work(source.database, old, now=now)
    if live is not None:
        raise UsageError(
            f"Session {live.id} on {live.host} is using {source.database.name}. End this session first: mbqueue stop"
        )
    mark_moved(old, source.database.dialect, COLUMNS, target=target, now=now)


def _take_back(target: Queue, old: Statements, new: Statements) -> None:
    """Empty a target whose queue was moved away, if the source contains all of that queue's events."""
    version = version_before(new)
    if version is None:
        return
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{target.database.name} contains the remains of a queue that another version of mbqueue moved (schema "
            f"version {version}, but this mbqueue uses version {SCHEMA_VERSION}). Use another schema=NAME."
        )
    if not _goes_on(old, after=new):
        raise UsageError(
            f"{target.database.name} contains the remains of a different queue, which was moved away. Use another "
            "schema=NAME."
        )
    empty_moved(new, COLUMNS)


def _is_copied(path: Path, old: Statements) -> bool:
    """Whether a file already contains a copy of the queue; False if there is no file, or its queue was moved away."""
    if not path.exists():
        return False
    try:
        with Queue(path, read_only=True) as there, there.reading() as db:
            if not _is_empty(old) and _goes_on(db, after=old):
                return True
    except QueueMoved:
        return False
    raise UsageError(
        f"{path} already contains another queue. First rename this file and all files next to it that begin with "
        f"{path.name}."
    )


def _goes_on(db: Statements, *, after: Statements) -> bool:
    """Whether ``db`` is a later state of ``after``: its events begin with all events of ``after``."""
    events = rows_of(db, "events")
    return all(next(events, None) == before for before in rows_of(after, "events"))


def _is_empty(db: Statements) -> bool:
    return not any(_counts(db).values())


def _counts(db: Statements) -> dict[str, int]:
    return {table: int(db.execute(f"SELECT count(*) AS n FROM {table}").fetchone()["n"]) for table in COLUMNS}


def _copy(old: Statements, target: Queue, new: Statements) -> None:
    with _without_triggers(target, new):
        for table in COLUMNS:
            _fill(target, new, table, rows_of(old, table))
    if target.database.dialect is POSTGRESQL:
        for table in _NUMBERED:
            new.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}")
    for table in COLUMNS:
        for was, is_now in zip(rows_of(old, table), rows_of(new, table), strict=True):
            if was != is_now:
                raise QueueError(
                    f"Row {was[0]} of {table} cannot be stored unchanged in {target.database.name} (an "
                    "unsupported character?). Nothing was changed."
                )


def _fill(target: Queue, db: Statements, table: str, rows: Iterator[tuple[Any, ...]]) -> None:
    columns = COLUMNS[table].split(", ")
    statement = f"INSERT INTO {table} ({COLUMNS[table]}) VALUES ({', '.join('?' * len(columns))})"
    narrow = (
        {row["attname"] for row in db.execute(_NARROW, (table,))} if target.database.dialect is POSTGRESQL else set()
    )
    positions = [position for position, column in enumerate(columns) if column in narrow]
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        for row in chunk:
            for position in positions:
                if row[position] is not None and abs(row[position]) > _LARGEST_NARROW:
                    raise QueueError(
                        f"Row {row[0]} of {table} has {columns[position]} = {row[position]}, which "
                        f"{target.database.name} cannot store. Nothing was changed."
                    )
        db.executemany(statement, chunk)


@contextmanager
def _without_triggers(target: Queue, db: Statements) -> Iterator[None]:
    """Disable the triggers inside the block, so that jobs can be inserted in any state and without events."""
    if target.database.dialect is POSTGRESQL:
        db.execute("ALTER TABLE jobs DISABLE TRIGGER USER")
        yield
        db.execute("ALTER TABLE jobs ENABLE TRIGGER USER")
        return
    triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for trigger in triggers:
        db.execute(f"DROP TRIGGER {trigger['name']}")
    yield
    for trigger in triggers:
        db.execute(trigger["sql"])

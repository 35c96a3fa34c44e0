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
from mbqueue.queue.moved_mark import empty_moved, mark_moved, version_before
from mbqueue.queue.schema import SCHEMA_VERSION, TABLES
from mbqueue.queue.sessions import at_work
from mbqueue.queue.sqlite import set_aside, settle
from mbqueue.queue.store import Queue

_ROWS_AT_ONCE = 1000

_NUMBERED = ("experiments", "jobs", "events")
#: Finds the columns of a PostgreSQL table that hold fewer than 64 bits.
_NARROW = "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(?) AND atttypid = to_regtype('integer')"
_LARGEST_NARROW = 2**31 - 1

# Tries to take a queue's lock, which the transaction then holds until it ends. Each queue in a database has its own
# lock.
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


def rows_of(db: Statements, table: str) -> Iterator[dict[str, Any]]:
    """Every row of a table, in an order that does not depend on the database."""
    order = "job_id, needed_id" if table == "needs" else "id"
    return (dict(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY {order}"))


def copy_queue(source: Queue, target: Queue, *, now: float) -> Migrated:
    """Copy a queue into an empty one, and mark the source as moved (`mbqueue.queue.moved_mark`).

    Before the commit, all copied rows are read back and compared. A target also counts as empty if its queue was moved
    away earlier and the source contains all of that queue's events. If an earlier run copied the queue but crashed
    before it marked the source, this run only marks the source.

    Raises:
        UsageError: if a session is using the source, or the target is not empty.
        QueueError: if the target cannot store a value unchanged. Neither queue is changed.
    """
    with source.writing() as old, target.writing() as new:  # on exit, the target commits first
        _require_another(source, old, target, new)
        _leave(source, old, target.database.name, now=now)
        if target.database.dialect is POSTGRESQL:
            _take_back(target, old, new)
        if _is_empty(new):
            _copy(old, target, new)
        elif _is_empty(old) or not _goes_on(new, after=old):
            raise UsageError(
                f"{target.database.name} is not empty. Use an empty database, or name a new schema with schema=NAME in "
                "the URL."
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
        raise UsageError(f"The queue {source.database.name} is already an SQLite file. Nothing was changed.")
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
    """Refuse to move a queue onto itself, which could happen if its address is spelled in two ways."""
    if not source.database.dialect is target.database.dialect is POSTGRESQL:
        return
    if not (old.execute(_ONE_MOVER).fetchone()["is_ours"] and new.execute(_ONE_MOVER).fetchone()["is_ours"]):
        raise UsageError(
            f"{target.database.name} and {source.database.name} are the same queue, or another process is "
            "moving one of them right now. Nothing was changed."
        )


def _leave(source: Queue, old: Statements, target: str, *, now: float) -> None:
    """Mark the source as moved. The caller must commit the target's transaction first."""
    now = source.database.instant(old, now)
    if source.database.dialect is POSTGRESQL:
        old.execute(f"LOCK TABLE {', '.join(TABLES)} IN EXCLUSIVE MODE")
    live = at_work(source.database, old, now=now)
    if live is not None:
        raise UsageError(
            f"Session {live.id} on {live.host} is using {source.database.name}. End this session first: mbqueue stop"
        )
    mark_moved(old, source.database.dialect, target=target, now=now)


def _take_back(target: Queue, old: Statements, new: Statements) -> None:
    """Clear a target whose queue was moved away, if the source contains all of that queue's events."""
    version = version_before(new)
    if version is None:
        return
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{target.database.name} still contains tables left over from a queue that another version of mbqueue "
            f"moved. The tables have schema version {version}, but this mbqueue uses {SCHEMA_VERSION}. Name a "
            "different schema with schema=NAME in the URL."
        )
    if not _goes_on(old, after=new):
        raise UsageError(
            f"{target.database.name} still contains tables left over from a different queue that was moved. Name a "
            "different schema with schema=NAME in the URL."
        )
    empty_moved(new)


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
        f"{path} already contains another queue. First rename this file and all files next to it whose names begin "
        f"with {path.name}."
    )


def _goes_on(db: Statements, *, after: Statements) -> bool:
    """Whether ``db`` is a later state of ``after``: its events begin with all events of ``after``."""
    events = rows_of(db, "events")
    return all(next(events, None) == before for before in rows_of(after, "events"))


def _is_empty(db: Statements) -> bool:
    return not any(_counts(db).values())


def _counts(db: Statements) -> dict[str, int]:
    return {table: int(db.execute(f"SELECT count(*) AS n FROM {table}").fetchone()["n"]) for table in TABLES}


def _copy(old: Statements, target: Queue, new: Statements) -> None:
    with _without_triggers(target, new):
        for table in TABLES:
            _fill(target, new, table, rows_of(old, table))
    if target.database.dialect is POSTGRESQL:
        for table in _NUMBERED:
            new.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}")
    for table in TABLES:
        for was, is_now in zip(rows_of(old, table), rows_of(new, table), strict=True):
            if was != is_now:
                raise QueueError(
                    f"Row {_key(was)} of {table} cannot be stored unchanged in {target.database.name} (an "
                    "unsupported character?). Nothing was changed."
                )


def _fill(target: Queue, db: Statements, table: str, rows: Iterator[dict[str, Any]]) -> None:
    narrow = (
        {row["attname"] for row in db.execute(_NARROW, (table,))} if target.database.dialect is POSTGRESQL else set()
    )
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        for row in chunk:
            for column in narrow:
                if row[column] is not None and abs(row[column]) > _LARGEST_NARROW:
                    raise QueueError(
                        f"Row {_key(row)} of {table} has {column} = {row[column]}, which "
                        f"{target.database.name} cannot store. Nothing was changed."
                    )
        names, marks = ", ".join(chunk[0]), ", ".join(f":{column}" for column in chunk[0])
        db.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", chunk)


def _key(row: dict[str, Any]) -> Any:
    return next(iter(row.values()))


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

"""Copying a queue from one database into another, whole: rows, ids, fences and events as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mbqueue import files
from mbqueue.errors import QueueError, UsageError
from mbqueue.queue.database import Statements
from mbqueue.queue.sqlite import settle
from mbqueue.queue.store import Queue

_ROWS_AT_ONCE = 1000

#: What a queue consists of, in an order in which every row finds what it refers to; the first column is the order.
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


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """What was copied.

    Attributes:
        rows: table → number of rows.
        source, target: where from and where to, without passwords.
    """

    rows: dict[str, int]
    source: str
    target: str


def rows_of(db: Statements, table: str) -> Iterator[tuple[Any, ...]]:
    """All rows of one table of a queue, in an order that is the same in every database."""
    order = "job_id, needed_id" if table == "needs" else "id"
    query = f"SELECT {COLUMNS[table]} FROM {table} ORDER BY {order}"  # noqa: S608 - constants of this module
    return (tuple(row) for row in db.execute(query))


def copy_queue(source: Queue, target: Queue, *, now: float) -> Migrated:
    """Fill an empty queue with what is in another; nobody writes to either meanwhile, and the other one stays.

    What was written is read back and compared before it is committed.

    Raises:
        UsageError: when a session works with the source, or the target is not empty.
        QueueError: when something cannot be kept as it is; nothing was written then.
    """
    with source.writing() as old, target.writing() as new:
        now = source.database.instant(old, now)
        if source.database.dialect == "postgresql":
            old.execute("LOCK TABLE experiments, sessions, jobs, needs, events, commits_place IN EXCLUSIVE MODE")
        live = old.execute(
            "SELECT id, host FROM sessions WHERE ended_at IS NULL AND alive_until > ?", (now,)
        ).fetchone()
        if live is not None:
            raise UsageError(
                f"Session {live[0]} on {live[1]} works with {source.database.name}. End it first: mbqueue stop"
            )
        if any(next(rows_of(new, table), None) is not None for table in COLUMNS):
            raise UsageError(
                f"{target.database.name} is not empty. Give an empty one, for example another schema=NAME."
            )
        with _without_triggers(target, new):
            counts = {table: _fill(new, table, rows_of(old, table)) for table in COLUMNS}
        if target.database.dialect == "postgresql":
            for table in _NUMBERED:
                new.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}")  # noqa: S608
        for table in COLUMNS:
            for was, is_now in zip(rows_of(old, table), rows_of(new, table), strict=True):
                if was != is_now:
                    raise QueueError(
                        f"Row {was[0]} of {table} cannot be kept as it is in {target.database.name} (a character that "
                        "it cannot hold?). Nothing was written there."
                    )
    return Migrated(rows=counts, source=source.database.name, target=target.database.name)


def copy_to_file(source: Queue, path: Path, *, now: float) -> Migrated:
    """As `copy_queue`, into a new SQLite file that appears only once it is whole.

    Raises:
        UsageError: when the file exists; otherwise as `copy_queue`.
    """
    if path.exists():
        raise UsageError(f"There is a queue at {path}. Move it and the files beside it out of the way first.")
    building = path.with_name(f"{files.TEMP_PREFIX}{path.name}")
    try:
        for left in path.parent.glob(f"{building.name}*"):
            left.unlink()
        with Queue(building) as target:
            migrated = copy_queue(source, target, now=now)
        settle(building)
        building.replace(path)
        files.fsync_dir(path.parent)
    finally:
        for left in path.parent.glob(f"{building.name}*"):
            left.unlink()
    return Migrated(rows=migrated.rows, source=migrated.source, target=str(path))


def _fill(db: Statements, table: str, rows: Iterator[tuple[Any, ...]]) -> int:
    columns = COLUMNS[table]
    statement = f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' for _ in columns.split(','))})"  # noqa: S608
    count = 0
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        db.executemany(statement, chunk)
        count += len(chunk)
    return count


@contextmanager
def _without_triggers(target: Queue, db: Statements) -> Iterator[None]:
    """Within the transaction, and unseen by others, let jobs be written in any state and without events."""
    if target.database.dialect == "postgresql":
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

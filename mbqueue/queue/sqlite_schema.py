"""Create and upgrade the tables of a queue in a SQLite file.

The schema version is stored in `PRAGMA user_version`, so that opening a current database takes only one small read.
Never edit a released version: add an entry to `_STEPS` instead.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime

from mbqueue.queue.dialect import SQLITE
from mbqueue.queue.moved_mark import MOVED_VERSION, moved_error
from mbqueue.queue.schema import RULES, SCHEMA_VERSION, commits_place, event_inserts, require_known, tables
from mbqueue.queue.transitions import TRANSITIONS

#: The name that a database records for each schema version, oldest first. A database with a name that is missing here
#: was written by a newer mbqueue, so its high version number is not a sign of damage.
_NAMES = ("0001_queue", "0002_adopting", "0003_commits_place", "0004_claiming_next", "0005_pruning")
_SET = "mbqueue.queue"

_EVENTS_INDEX = "CREATE INDEX events_experiment ON events (experiment_id)"

#: The statements that upgrade to each version from the previous version. Versions not listed here changed only
#: rows of the transition table.
_STEPS: dict[int, tuple[str, ...]] = {
    3: (commits_place(SQLITE).strip(),),
    4: ("DROP INDEX events_experiment",),  # few queries used this index, but every event had to be written to it
}

#: The table of recorded names, exactly as sqlite-utils created it in existing databases.
_RECORD = (
    """
    CREATE TABLE "_sqlite_migrations" (
       "id" INTEGER PRIMARY KEY,
       "migration_set" TEXT,
       "name" TEXT,
       "applied_at" TEXT
    )
    """,
    """
    CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
        ON "_sqlite_migrations" ("migration_set", "name")
    """,
)


def is_current(connection: sqlite3.Connection, *, path: object) -> bool:
    """Whether the database has the schema that this program writes.

    Raises:
        SchemaTooNew: if a newer mbqueue wrote the database.
        QueueMoved: if the queue was moved to a different database.
        DatabaseError: if the database is damaged.
    """
    version = _version_of(connection)
    if version == MOVED_VERSION:
        target, at = connection.execute("SELECT target, at FROM moved").fetchone()
        raise moved_error(path, target, at)
    if version > SCHEMA_VERSION and not _has_a_later_name(connection):
        damage = sqlite3.DatabaseError(f"no release of mbqueue writes schema version {version}")
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage
    require_known(version, name=path)
    return version == SCHEMA_VERSION


def upgrade(connection: sqlite3.Connection, *, path: object) -> None:
    """Create or upgrade the schema in one transaction, so that several processes can try at the same time.

    The connection must be in autocommit mode (``isolation_level=None``).

    Raises:
        SchemaTooNew: if a newer mbqueue wrote the database.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not is_current(connection, path=path):
            version = _version_of(connection)
            if version == 0:
                _make(connection, SCHEMA_VERSION)
            else:
                _step(connection, version, SCHEMA_VERSION)
            at = datetime.now(UTC).isoformat(sep=" ")
            connection.executemany(
                "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES (?, ?, ?)",
                [(_SET, name, at) for name in _NAMES[version:]],
            )
            connection.execute("DELETE FROM transitions")
            connection.executemany(
                "INSERT INTO transitions (from_state, to_state, reason) VALUES (?, ?, ?)",
                [(row.from_state.value, row.to_state.value, row.reason) for row in TRANSITIONS],
            )
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def _make(connection: sqlite3.Connection, version: int) -> None:
    for statement in (*_RECORD, *tables(SQLITE), *_triggers()):
        connection.execute(statement.strip())
    if version < 4:
        connection.execute(_EVENTS_INDEX)
    if version < 3:
        connection.execute("DROP TABLE commits_place")
    _step(connection, 4, version)


def _step(connection: sqlite3.Connection, version: int, wanted: int) -> None:
    for step in range(version + 1, wanted + 1):
        for statement in _STEPS.get(step, ()):
            connection.execute(statement)


def _triggers() -> Iterator[str]:
    for rule in RULES:
        when = "" if rule.breaks is None else f" WHEN {rule.breaks('')}"
        refusal = f"SELECT RAISE(ABORT, 'forbidden transition: {rule.says}');"
        yield f"CREATE TRIGGER {rule.name} BEFORE {rule.event} ON jobs{when} BEGIN {refusal} END"
    enqueued, changed = event_inserts()
    yield f"CREATE TRIGGER jobs_enqueued_event AFTER INSERT ON jobs BEGIN {enqueued} END"
    yield f"CREATE TRIGGER jobs_changed_event AFTER UPDATE OF state ON jobs BEGIN {changed} END"


def _version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _has_a_later_name(connection: sqlite3.Connection) -> bool:
    applied = connection.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = ?", (_SET,))
    return any(name not in _NAMES for (name, *_) in applied)


#: The type, name and SQL of every table, trigger, view and index of a database.
Definitions = set[tuple[str, str, str]]
_EXPECTED: dict[int, Definitions] = {}


def definitions(db: sqlite3.Connection) -> Definitions:
    """The definitions of a database's tables, triggers, views and indexes.

    SQLite's statistics tables (sqlite_stat1 …) are left out, because any program can create them with ANALYZE.
    """
    rows = db.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite^_stat_' ESCAPE '^'")
    return {(kind, name, " ".join((text or "").split())) for kind, name, text in rows}


def expected_definitions(version: int) -> Definitions:
    """The definitions that a queue of the given schema version must have."""
    if version not in _EXPECTED:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            _make(db, version)
            _EXPECTED[version] = definitions(db)
    return _EXPECTED[version]

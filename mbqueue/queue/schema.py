"""The tables of the queue's database, and how an older database becomes a current one.

`PRAGMA user_version` says which version a database has, so that opening a current one costs one small read and
imports nothing. sqlite-utils runs the migrations and records them; it is imported only when there is something
to do. A migration, once released, is never edited: `tests/queue/fixtures` holds a database of every version.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from mbqueue.errors import SchemaTooNew
from mbqueue.queue.moved import MOVED_VERSION, moved_error
from mbqueue.queue.transitions import TRANSITIONS

if TYPE_CHECKING:
    from sqlite_utils import Database, Migrations

SCHEMA_VERSION = 4
#: Names of the migrations, by which sqlite-utils records them; the first makes version 1.
_MIGRATIONS = ("0001_queue", "0002_adopting", "0003_commits_place", "0004_claiming_next")
_MIGRATION_SET = "mbqueue.queue"

_VERSION_1 = (
    """
    CREATE TABLE experiments (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        spec TEXT NOT NULL CHECK (json_valid(spec)),
        spec_hash TEXT NOT NULL,
        results_dir TEXT NOT NULL UNIQUE,
        dataset TEXT NOT NULL,
        dataset_hash TEXT,
        priority INTEGER NOT NULL,
        paused INTEGER NOT NULL DEFAULT 0,
        enqueued_at REAL NOT NULL
    ) STRICT
    """,
    """
    CREATE TABLE sessions (
        id TEXT PRIMARY KEY,
        host TEXT NOT NULL,
        boot_id TEXT,
        pid INTEGER NOT NULL,
        pid_started INTEGER,
        device TEXT NOT NULL,
        started_at REAL NOT NULL,
        heartbeat_at REAL NOT NULL,
        alive_until REAL NOT NULL,
        deadline_at REAL,
        ended_at REAL,
        end_reason TEXT,
        structures_per_second REAL
    ) STRICT
    """,
    # What the dashboard adds up of `result` stands in columns of its own, and cannot disagree with it. (Generated
    # columns would say the same, but SQLite does not read those from an index alone.)
    """
    CREATE TABLE jobs (
        id INTEGER PRIMARY KEY,
        experiment_id INTEGER NOT NULL REFERENCES experiments (id),
        kind TEXT NOT NULL CHECK (kind IN ('prepare', 'train', 'predict', 'record')),
        fold INTEGER,
        epoch INTEGER,
        state TEXT NOT NULL,
        priority INTEGER NOT NULL,
        paused INTEGER NOT NULL DEFAULT 0,
        started INTEGER NOT NULL DEFAULT 0,
        fence INTEGER NOT NULL DEFAULT 0,
        session_id TEXT REFERENCES sessions (id),
        lease_expires_at REAL,
        affinity TEXT REFERENCES sessions (id),
        failures INTEGER NOT NULL DEFAULT 0,
        preemptions INTEGER NOT NULL DEFAULT 0,
        lost_in_a_row INTEGER NOT NULL DEFAULT 0,
        not_before REAL NOT NULL DEFAULT 0,
        enqueued_at REAL NOT NULL,
        changed_at REAL NOT NULL,
        changed_by TEXT NOT NULL,
        changed_why TEXT NOT NULL,
        progress TEXT CHECK (progress IS NULL OR json_valid(progress)),
        result TEXT CHECK (result IS NULL OR json_valid(result)),
        error TEXT,
        val_mae REAL CHECK (val_mae IS CAST(json_extract(result, '$.val_mae') AS REAL)),
        test_mae REAL CHECK (test_mae IS CAST(json_extract(result, '$.test_mae') AS REAL)),
        seconds REAL CHECK (seconds IS CAST(json_extract(result, '$.seconds') AS REAL)),
        CHECK ((fold IS NULL) = (kind IN ('prepare', 'record'))),
        CHECK ((epoch IS NULL) = (kind <> 'train')),
        CHECK ((state = 'leased') = (session_id IS NOT NULL)),
        CHECK ((state = 'leased') = (lease_expires_at IS NOT NULL)),
        CHECK ((state = 'committed') = (result IS NOT NULL))
    ) STRICT
    """,
    # One job for each piece of work, whatever is enqueued how often.
    "CREATE UNIQUE INDEX jobs_identity ON jobs (experiment_id, kind, ifnull(fold, -1), ifnull(epoch, -1))",
    # The claim walks this one from its head and stops at the first row that it may take.
    """
    CREATE INDEX jobs_claim ON jobs (priority DESC, started DESC, id, not_before, affinity)
    WHERE state = 'ready' AND paused = 0
    """,
    "CREATE INDEX jobs_loaded ON jobs (experiment_id, fold, id) WHERE state = 'ready' AND paused = 0",
    "CREATE INDEX jobs_leased ON jobs (session_id, lease_expires_at) WHERE state = 'leased'",
    "CREATE INDEX jobs_error ON jobs (changed_at) WHERE error IS NOT NULL",
    # The dashboard reads this index alone, never the rows.
    "CREATE INDEX jobs_board ON jobs (experiment_id, fold, epoch, state, kind, paused, val_mae, test_mae, seconds)",
    """
    CREATE TABLE needs (
        job_id INTEGER NOT NULL REFERENCES jobs (id),
        needed_id INTEGER NOT NULL REFERENCES jobs (id),
        PRIMARY KEY (job_id, needed_id)
    ) STRICT, WITHOUT ROWID
    """,
    "CREATE INDEX needs_needed ON needs (needed_id)",
    """
    CREATE TABLE transitions (
        from_state TEXT NOT NULL,
        to_state TEXT NOT NULL,
        reason TEXT NOT NULL,
        PRIMARY KEY (from_state, to_state)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        job_id INTEGER REFERENCES jobs (id),
        experiment_id INTEGER REFERENCES experiments (id),
        by TEXT NOT NULL,
        from_state TEXT,
        to_state TEXT,
        why TEXT NOT NULL
    ) STRICT
    """,
    "CREATE INDEX events_experiment ON events (experiment_id)",
    """
    CREATE VIEW job_rows AS
    SELECT jobs.*, experiments.name AS experiment
    FROM jobs JOIN experiments ON experiments.id = jobs.experiment_id
    """,
    """
    CREATE VIEW event_rows AS
    SELECT events.*, experiments.name AS experiment, jobs.kind, jobs.fold, jobs.epoch
    FROM events
    LEFT JOIN jobs ON jobs.id = events.job_id
    LEFT JOIN experiments ON experiments.id = events.experiment_id
    """,
    """
    CREATE TRIGGER jobs_start_waiting BEFORE INSERT ON jobs WHEN NEW.state <> 'waiting'
    BEGIN SELECT RAISE(ABORT, 'forbidden transition: a new job is waiting'); END
    """,
    """
    CREATE TRIGGER jobs_follow_the_table BEFORE UPDATE OF state ON jobs
    WHEN NOT EXISTS (SELECT 1 FROM transitions WHERE from_state = OLD.state AND to_state = NEW.state)
    BEGIN SELECT RAISE(ABORT, 'forbidden transition: not in the table of transitions'); END
    """,
    """
    CREATE TRIGGER jobs_fence_every_claim BEFORE UPDATE OF state ON jobs
    WHEN NEW.state = 'leased' AND NEW.fence <> OLD.fence + 1
    BEGIN SELECT RAISE(ABORT, 'forbidden transition: a claim raises the fence by one'); END
    """,
    """
    CREATE TRIGGER jobs_fence_never_falls BEFORE UPDATE OF fence ON jobs WHEN NEW.fence < OLD.fence
    BEGIN SELECT RAISE(ABORT, 'forbidden transition: a fence never falls'); END
    """,
    """
    CREATE TRIGGER jobs_are_never_deleted BEFORE DELETE ON jobs
    BEGIN SELECT RAISE(ABORT, 'forbidden transition: a job is never deleted'); END
    """,
    """
    CREATE TRIGGER jobs_enqueued_event AFTER INSERT ON jobs BEGIN
        INSERT INTO events (at, job_id, experiment_id, by, to_state, why)
        VALUES (NEW.changed_at, NEW.id, NEW.experiment_id, NEW.changed_by, NEW.state, NEW.changed_why);
    END
    """,
    """
    CREATE TRIGGER jobs_changed_event AFTER UPDATE OF state ON jobs BEGIN
        INSERT INTO events (at, job_id, experiment_id, by, from_state, to_state, why)
        VALUES (NEW.changed_at, NEW.id, NEW.experiment_id, NEW.changed_by, OLD.state, NEW.state, NEW.changed_why);
    END
    """,
)

_VERSION_3 = (
    # Where the commits are (mbqueue.queue.commits_place): one row, or none while nobody has said.
    """
    CREATE TABLE commits_place (
        number INTEGER PRIMARY KEY CHECK (number = 1),
        id TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('store', 'folder')),
        address TEXT NOT NULL,
        since REAL NOT NULL,
        by TEXT NOT NULL
    ) STRICT
    """,
)


def is_current(connection: sqlite3.Connection, *, path: object) -> bool:
    """Whether the database has the schema that this program writes.

    Raises:
        SchemaTooNew: when a newer mbqueue wrote it.
        QueueMoved: when it is in another database now.
        DatabaseError: when it is damaged.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == MOVED_VERSION:
        raise moved_error(path, connection.execute("SELECT target, at FROM moved").fetchone())
    if version > SCHEMA_VERSION and not _has_a_later_migration(connection):
        damage = sqlite3.DatabaseError(f"its version, {version}, is none that it was ever given")
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage
    require_known(version, SCHEMA_VERSION, name=path)
    return bool(version == SCHEMA_VERSION)


def _has_a_later_migration(connection: sqlite3.Connection) -> bool:
    """Whether migrations were recorded that this program does not know, beside the version that they set."""
    applied = connection.execute("SELECT name FROM _sqlite_migrations WHERE migration_set = ?", (_MIGRATION_SET,))
    return any(name not in _MIGRATIONS for (name, *_) in applied)


def require_known(version: int, newest: int, *, name: object) -> None:
    """Refuse a database of a later version than this program's newest.

    Raises:
        SchemaTooNew: when it is.
    """
    if version > newest:
        raise SchemaTooNew(
            f"{name} has schema version {version}, and this mbqueue knows versions up to {newest}: a newer mbqueue "
            "wrote it. Nothing was changed. Upgrade with: pip install --upgrade mbqueue"
        )


def upgrade(connection: sqlite3.Connection, *, path: object) -> None:
    """Create or upgrade the schema: all of it or nothing, also when several processes try at once.

    The connection must be in autocommit mode (``isolation_level=None``).

    Raises:
        SchemaTooNew: when a newer mbqueue wrote the database.
    """
    from sqlite_utils import Database  # noqa: PLC0415  (slow to import, and needed only here)

    connection.execute("BEGIN IMMEDIATE")
    try:
        if not is_current(connection, path=path):
            migrations().apply(Database(connection, recursive_triggers=False, execute_plugins=False))
            connection.execute("DELETE FROM transitions")
            connection.executemany(
                "INSERT INTO transitions (from_state, to_state, reason) VALUES (?, ?, ?)",
                [(row.from_state.value, row.to_state.value, row.reason) for row in TRANSITIONS],
            )
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def migrations() -> Migrations:
    """All migrations, oldest first; each sets `user_version` in its own transaction."""
    from sqlite_utils import Migrations  # noqa: PLC0415  (slow to import, and needed only here)

    steps = Migrations(_MIGRATION_SET)

    def queue(db: Database) -> None:
        for statement in _VERSION_1:
            db.conn.execute(statement.strip())
        db.conn.execute("PRAGMA user_version = 1")

    def adopting(db: Database) -> None:
        # The table of transitions has new rows, and `upgrade` writes it anew.
        db.conn.execute("PRAGMA user_version = 2")

    def commits_place(db: Database) -> None:
        for statement in _VERSION_3:
            db.conn.execute(statement.strip())
        db.conn.execute("PRAGMA user_version = 3")

    def claiming_next(db: Database) -> None:
        # As `adopting`. Each event was written to an index that hardly anybody reads.
        db.conn.execute("DROP INDEX events_experiment")
        db.conn.execute("PRAGMA user_version = 4")

    for name, step in zip(_MIGRATIONS, (queue, adopting, commits_place, claiming_next), strict=True):
        steps(name=name)(step)
    return steps


#: Type, name and SQL of everything that a database defines.
Definitions = set[tuple[str, str, str | None]]
_EXPECTED: dict[int, Definitions] = {}


def definitions(db: sqlite3.Connection) -> Definitions:
    """The tables, triggers, views and indexes of a database, word for word."""
    return set(db.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


def expected_definitions(version: int) -> Definitions:
    """Those that a queue of this version has."""
    if version not in _EXPECTED:
        from sqlite_utils import Database  # noqa: PLC0415  (slow to import, and needed only here)

        with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            later = _MIGRATIONS[version:]
            migrations().apply(Database(db, recursive_triggers=False, execute_plugins=False), stop_before=later)
            _EXPECTED[version] = definitions(db)
    return _EXPECTED[version]

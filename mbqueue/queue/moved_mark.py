"""Mark a queue as moved to a different database. A marked queue names the new database and refuses all writes.

Two databases with the same jobs would hand out each job twice, under the same fence. So the old database gets a schema
version that every release of mbqueue rejects, including old releases. Triggers refuse writes from processes that opened
the old database earlier, such as a session that was frozen during the move. A marked queue can still be read.
"""

from __future__ import annotations

from mbqueue.clock import utc_text
from mbqueue.errors import QueueMoved
from mbqueue.queue.database import Statements
from mbqueue.queue.dialect import SQLITE, Dialect
from mbqueue.queue.schema import TABLES

#: The schema version that marks a queue as moved to another database.
MOVED_VERSION = 1_000_000
_REFUSAL = "the queue was moved to another database meanwhile; start again to see where it is"

_SQLITE = (
    "CREATE TABLE moved (version INTEGER NOT NULL, target TEXT NOT NULL, at REAL NOT NULL) STRICT",
    "INSERT INTO moved (version, target, at) SELECT user_version, :target, :now FROM pragma_user_version",
    f"PRAGMA user_version = {MOVED_VERSION}",
)
_SQLITE_TABLE = tuple(
    f"CREATE TRIGGER {{table}}_moved_{action} BEFORE {action} ON {{table}} BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    for action in ("INSERT", "UPDATE")
)
_POSTGRESQL = (
    "CREATE TABLE moved (version integer NOT NULL, target text NOT NULL, at double precision NOT NULL)",
    "INSERT INTO moved (version, target, at) SELECT version, :target, :now FROM mbqueue_schema",
    "GRANT SELECT ON moved TO PUBLIC",
    f"CREATE FUNCTION refuse_moved() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    f"UPDATE mbqueue_schema SET version = {MOVED_VERSION}",
)
_POSTGRESQL_TABLE = (
    "CREATE TRIGGER moved BEFORE INSERT OR UPDATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION refuse_moved()",
)


def mark_moved(db: Statements, dialect: Dialect, *, target: str, now: float) -> None:
    """Mark a queue as moved, within a transaction. ``target`` must not contain a password."""
    once, each = (_SQLITE, _SQLITE_TABLE) if dialect is SQLITE else (_POSTGRESQL, _POSTGRESQL_TABLE)
    for statement in (*once, *(statement.format(table=table) for table in TABLES for statement in each)):
        db.execute(statement, {"target": target, "now": now} if ":target" in statement else {})


def version_before(db: Statements) -> int | None:
    """The schema version that a queue on a server had when it was moved away; None if the queue was not moved."""
    if db.execute("SELECT 1 FROM mbqueue_schema WHERE version = ?", (MOVED_VERSION,)).fetchone() is None:
        return None
    return int(db.execute("SELECT version FROM moved").fetchone()["version"])


def empty_moved(db: Statements) -> None:
    """Turn a moved queue on a server into an empty, usable queue, within a transaction. Grants to roles are kept."""
    db.execute("UPDATE mbqueue_schema SET version = (SELECT version FROM moved)")
    db.execute("DROP TABLE moved")
    db.execute("DROP FUNCTION refuse_moved() CASCADE")
    db.execute("ALTER TABLE jobs DISABLE TRIGGER USER")
    db.execute(f"TRUNCATE {', '.join(TABLES)}")
    db.execute("ALTER TABLE jobs ENABLE TRIGGER USER")


def moved_error(name: object, target: str, at: float) -> QueueMoved:
    """Make the error for a queue that was moved to ``target`` at the time ``at``, a Unix timestamp."""
    if target.startswith("postgresql://"):
        there = "set `queue` in mbqueue.toml, or MBQUEUE_QUEUE, to that URL"
    else:
        there = "remove `queue` from mbqueue.toml and unset MBQUEUE_QUEUE"
    return QueueMoved(
        f"This queue was moved on {utc_text(at)}, from {name} to {target}. To use the queue there: {there}. To move "
        "the queue back, run: mbqueue migrate-queue. If the new database is lost, run: mbqueue recover --force"
    )

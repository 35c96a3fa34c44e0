"""Create and upgrade the tables of a queue in a schema of a PostgreSQL database.

The table ``mbqueue_schema`` contains the schema version. Never edit a released version: add an entry to `_STEPS`
instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mbqueue.queue.dialect import POSTGRESQL
from mbqueue.queue.schema import (
    FENCE_NEVER_FALLS,
    FENCES_EVERY_CLAIM,
    FOLLOWS_THE_TABLE,
    NEVER_DELETED,
    SCHEMA_VERSION,
    STARTS_WAITING,
    Rule,
    column_checks,
    commits_place,
    event_inserts,
    require_known,
    row_checks,
    tables,
)
from mbqueue.queue.transitions import TRANSITIONS

if TYPE_CHECKING:
    from psycopg import Connection

#: The channel on which the server announces changes to waiting workers. Each notification contains the name of the
#: schema.
CHANNEL = "mbqueue"

# For each client, the number of the last transaction that it committed. If a connection is lost during a commit, this
# number shows whether the transaction took effect.
_RECEIPTS = """
    CREATE TABLE receipts (
        client text PRIMARY KEY,
        number bigint NOT NULL,
        at timestamptz NOT NULL DEFAULT now()
    ) WITH (fillfactor = 20)
"""


def _functions() -> Iterator[str]:
    """The trigger functions.

    PostgreSQL parses a function once per connection, but parses CHECK and WHEN again in every statement.
    """
    yield f"""
        CREATE OR REPLACE FUNCTION jobs_rules() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP IN ('DELETE', 'TRUNCATE') THEN {_refusal(NEVER_DELETED)}
            ELSIF TG_OP = 'INSERT' THEN {_unless_kept(STARTS_WAITING)}
            ELSE {_unless_kept(FOLLOWS_THE_TABLE)} {_unless_kept(FENCES_EVERY_CLAIM)}
            END IF;
            RETURN NEW;
        END $$
    """
    conditions = (*column_checks(POSTGRESQL, "NEW.").values(), *row_checks("NEW."))
    yield f"""
        CREATE OR REPLACE FUNCTION jobs_are_sound() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'UPDATE' THEN {_unless_kept(FENCE_NEVER_FALLS)} END IF;
            {" ".join(map(_unless_sound, conditions))}
            RETURN NEW;
        END $$
    """
    # Announce only jobs that other sessions may claim immediately. More announcements would be slow, because PostgreSQL
    # commits transactions that send notifications one at a time.
    enqueued, changed = event_inserts("{schema}.")
    yield f"""
        CREATE OR REPLACE FUNCTION jobs_event() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                {enqueued}
                RETURN NULL;
            END IF;
            IF NEW.state <> OLD.state THEN
                {changed}
            END IF;
            IF (NEW.state = 'ready' AND NEW.paused = 0 AND NEW.affinity IS DISTINCT FROM NEW.changed_by)
                    OR (NEW.state = 'committed' AND NEW.kind = 'record') THEN
                PERFORM pg_notify('{CHANNEL}', TG_TABLE_SCHEMA);
            END IF;
            RETURN NULL;
        END $$
    """
    yield f"""
        CREATE OR REPLACE FUNCTION tell_the_waiting() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('{CHANNEL}', TG_TABLE_SCHEMA);
            RETURN NULL;
        END $$
    """


def _refusal(rule: Rule) -> str:
    return f"RAISE EXCEPTION 'forbidden transition: {rule.says}';"


def _unless_kept(rule: Rule) -> str:
    assert rule.breaks is not None
    return f"IF {rule.breaks('{schema}.')} THEN {_refusal(rule)} END IF;"


def _unless_sound(condition: str) -> str:
    said = "there is no such job: " + condition.replace("NEW.", "").replace("'", "''").replace("%", "%%")
    return f"IF NOT ({condition}) THEN RAISE EXCEPTION '{said}' USING ERRCODE = 'check_violation'; END IF;"


_SOUND = "CREATE TRIGGER jobs_are_sound BEFORE INSERT OR UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_are_sound()"
_CHANGED = """
    CREATE TRIGGER jobs_changed_event AFTER UPDATE OF state, paused ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_event()
"""
_TRIGGERS = (
    "CREATE TRIGGER jobs_start_waiting BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_rules()",
    "CREATE TRIGGER jobs_follow_the_table BEFORE UPDATE OF state ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_rules()",
    "CREATE TRIGGER jobs_are_never_deleted BEFORE DELETE ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_rules()",
    "CREATE TRIGGER jobs_are_never_truncated BEFORE TRUNCATE ON jobs FOR EACH STATEMENT EXECUTE FUNCTION jobs_rules()",
    "CREATE TRIGGER jobs_enqueued_event AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_event()",
    _SOUND,
    _CHANGED,
    """
    CREATE TRIGGER sessions_ended AFTER UPDATE OF ended_at ON sessions FOR EACH ROW
    WHEN (NEW.ended_at IS NOT NULL) EXECUTE FUNCTION tell_the_waiting()
    """,
)
TRIGGERS = len(_TRIGGERS)

#: The statements that upgrade to each version from the previous version. Each upgrade also replaces the trigger
#: functions.
_STEPS: dict[int, tuple[str, ...]] = {
    2: (commits_place(POSTGRESQL),),
    # Before version 3, the table of jobs had CHECK constraints, and the table of events had foreign keys.
    3: (
        """
        DO $$
        DECLARE found record;
        BEGIN
            FOR found IN SELECT conrelid::regclass AS of, conname AS name FROM pg_constraint
                         WHERE (conrelid = to_regclass('jobs') AND contype = 'c')
                            OR (conrelid = to_regclass('events') AND contype = 'f')
            LOOP
                EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', found.of, found.name);
            END LOOP;
        END $$
        """,
        "DROP TRIGGER jobs_fence_never_falls ON jobs",
        "DROP FUNCTION jobs_fence_rule()",
        "DROP TRIGGER jobs_changed_event ON jobs",
        "DROP TRIGGER jobs_became_free ON jobs",
        "CREATE FUNCTION jobs_are_sound() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$",
        _SOUND,
        _CHANGED,
    ),
    4: ("DROP INDEX events_experiment",),  # few queries used this index, but every event had to be written to it
}

_IS_THERE = """
    SELECT 1 FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = %s AND relname = 'mbqueue_schema'
"""


def version_of(connection: Connection[Any], schema: str) -> int:
    """The version of the queue in a PostgreSQL schema; 0 if the schema contains no queue."""
    from psycopg import sql  # noqa: PLC0415 - optional package

    # to_regclass would miss tables that another process created while this process waited for the lock.
    if connection.execute(_IS_THERE, (schema,)).fetchone() is None:
        return 0
    table = sql.Identifier(schema, "mbqueue_schema")
    found = connection.execute(sql.SQL("SELECT version FROM {}").format(table)).fetchone()
    return 0 if found is None else int(found["version"])


def where_moved(connection: Connection[Any], schema: str) -> Any:
    """Read the row that records where (``target``) and when (``at``) a queue was moved."""
    from psycopg import sql  # noqa: PLC0415 - optional package

    return connection.execute(sql.SQL("SELECT target, at FROM {}").format(sql.Identifier(schema, "moved"))).fetchone()


def _statements_from(version: int) -> Iterator[str]:
    """The statements that upgrade a queue from an older version, or create a queue if ``version`` is 0."""
    if version == 0:
        yield from tables(POSTGRESQL)
        yield _RECEIPTS
        yield from _functions()
        yield from _TRIGGERS
        return
    for step in range(version + 1, SCHEMA_VERSION + 1):
        yield from _STEPS.get(step, ())
    yield from _functions()


def upgrade(connection: Connection[Any], schema: str, *, name: str) -> None:
    """Create or upgrade the tables in one transaction, so that several processes can try at the same time.

    Raises:
        SchemaTooNew: if a newer mbqueue wrote the tables.
    """
    from psycopg import sql  # noqa: PLC0415 - optional package

    identifier = sql.Identifier(schema)
    with connection.transaction():
        # Only one process at a time may create or upgrade tables, in any schema of this database.
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('mbqueue'), hashtext('schema'))")
        version = version_of(connection, schema)
        require_known(version, name=name)
        if version == SCHEMA_VERSION:
            return
        if connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,)).fetchone() is None:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(identifier))
        connection.execute(sql.SQL("SET LOCAL search_path TO {}, pg_temp").format(identifier))
        for statement in _statements_from(version):
            connection.execute(statement.replace("{schema}", identifier.as_string(connection)).encode())
        connection.execute("CREATE TABLE IF NOT EXISTS mbqueue_schema (version integer NOT NULL)")
        connection.execute("DELETE FROM mbqueue_schema")
        connection.execute("INSERT INTO mbqueue_schema VALUES (%s)", (SCHEMA_VERSION,))
        connection.execute("DELETE FROM transitions")
        connection.cursor().executemany(
            "INSERT INTO transitions (from_state, to_state, reason) VALUES (%s, %s, %s)",
            [(row.from_state.value, row.to_state.value, row.reason) for row in TRANSITIONS],
        )

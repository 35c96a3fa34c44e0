"""Define the tables of the queue, and the rules that the database enforces, once for both databases.

The modules `mbqueue.queue.sqlite_schema` and `mbqueue.queue.postgresql.schema` create and upgrade the tables.
`tests/queue/fixtures` contains a queue of every schema version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mbqueue.errors import SchemaTooNew
from mbqueue.queue.dialect import Dialect

SCHEMA_VERSION = 5

#: The tables that store a queue's content. Each table comes after the tables that its foreign keys refer to.
TABLES = ("experiments", "sessions", "jobs", "needs", "events", "commits_place")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule that the database enforces for every program.

    Attributes:
        name: the name of the trigger that enforces the rule.
        event: the statements to which the rule applies.
        breaks: takes the prefix of table names, and returns the condition under which a row breaks the rule; None if
            every row breaks the rule.
        says: the part of the error message after the words "forbidden transition".
    """

    name: str
    event: str
    breaks: Callable[[str], str] | None
    says: str


STARTS_WAITING = Rule(
    name="jobs_start_waiting",
    event="INSERT",
    breaks=lambda _: "NEW.state <> 'waiting'",
    says="a new job is waiting",
)
FOLLOWS_THE_TABLE = Rule(
    name="jobs_follow_the_table",
    event="UPDATE OF state",
    breaks=lambda schema_prefix: (
        f"NOT EXISTS (SELECT 1 FROM {schema_prefix}transitions WHERE from_state = OLD.state AND to_state = NEW.state)"
    ),
    says="not in the table of transitions",
)
FENCES_EVERY_CLAIM = Rule(
    name="jobs_fence_every_claim",
    event="UPDATE OF state",
    breaks=lambda _: "NEW.state = 'leased' AND NEW.fence <> OLD.fence + 1",
    says="a claim raises the fence by one",
)
FENCE_NEVER_FALLS = Rule(
    name="jobs_fence_never_falls",
    event="UPDATE OF fence",
    breaks=lambda _: "NEW.fence < OLD.fence",
    says="a fence never falls",
)
NEVER_DELETED = Rule(name="jobs_are_never_deleted", event="DELETE", breaks=None, says="a job is never deleted")

RULES = (STARTS_WAITING, FOLLOWS_THE_TABLE, FENCES_EVERY_CLAIM, FENCE_NEVER_FALLS, NEVER_DELETED)


def column_checks(sql: Dialect, row: str = "") -> dict[str, str]:
    """The SQL conditions on single columns of a job, by column; ``row`` is the prefix of each column's name.

    The dashboard's numbers are stored both in `result` and in columns of their own, and the conditions keep these
    columns equal to `result`. Generated columns would be simpler, but SQLite cannot read them from an index alone.
    """
    json = {name: f"{row}{name} IS NULL OR {sql.is_json(row + name)}" for name in ("progress", "result")}
    numbers = {
        name: sql.is_same(row + name, sql.json_number(f"{row}result", name))
        for name in ("val_mae", "test_mae", "seconds")
    }
    return {"kind": f"{row}kind IN ('prepare', 'train', 'predict', 'record')", **json, **numbers}


def row_checks(row: str = "") -> tuple[str, ...]:
    """The SQL conditions that each involve several columns of a job; ``row`` is the prefix of each column's name."""
    return (
        f"({row}fold IS NULL) = ({row}kind IN ('prepare', 'record'))",
        f"({row}epoch IS NULL) = ({row}kind <> 'train')",
        f"({row}state = 'leased') = ({row}session_id IS NOT NULL)",
        f"({row}state = 'leased') = ({row}lease_expires_at IS NOT NULL)",
        f"({row}state = 'committed') = ({row}result IS NOT NULL)",
    )


def event_inserts(schema_prefix: str = "") -> tuple[str, str]:
    """The statements with which triggers record a new job, and a job's new state, as events.

    Do not change their words: a SQLite queue whose triggers differ from `expected_definitions` counts as damaged.
    """
    insert = f"INSERT INTO {schema_prefix}events (at, job_id, experiment_id, by,"
    row = "NEW.changed_at, NEW.id, NEW.experiment_id, NEW.changed_by"
    return (
        f"{insert} to_state, why) VALUES ({row}, NEW.state, NEW.changed_why);",
        f"{insert} from_state, to_state, why) VALUES ({row}, OLD.state, NEW.state, NEW.changed_why);",
    )


def tables(sql: Dialect) -> Iterator[str]:
    """The statements that create the tables, indexes and views."""
    yield f"""
        CREATE TABLE experiments (
            id {sql.row_id},
            name {sql.text} NOT NULL UNIQUE,
            spec {sql.text} NOT NULL CHECK ({sql.is_json("spec")}),
            spec_hash {sql.text} NOT NULL,
            results_dir {sql.text} NOT NULL UNIQUE,
            dataset {sql.text} NOT NULL,
            dataset_hash {sql.text},
            priority {sql.integer} NOT NULL,
            paused {sql.integer} NOT NULL DEFAULT 0,
            enqueued_at {sql.real} NOT NULL
        ){sql.table}
    """
    yield f"""
        CREATE TABLE sessions (
            id {sql.text} PRIMARY KEY,
            host {sql.text} NOT NULL,
            boot_id {sql.text},
            pid {sql.bigint} NOT NULL,
            pid_started {sql.bigint},
            device {sql.text} NOT NULL,
            started_at {sql.real} NOT NULL,
            heartbeat_at {sql.real} NOT NULL,
            alive_until {sql.real} NOT NULL,
            deadline_at {sql.real},
            ended_at {sql.real},
            end_reason {sql.text},
            structures_per_second {sql.real}
        ){sql.table}
    """
    yield _jobs(sql)
    # Prevents a second job for the same work if an experiment is enqueued again.
    yield (
        "CREATE UNIQUE INDEX jobs_identity ON jobs "
        f"(experiment_id, kind, {sql.or_else}(fold, -1), {sql.or_else}(epoch, -1))"
    )
    # A claim reads this index in order, and stops at the first job that the session may claim.
    yield f"""
        CREATE INDEX jobs_claim ON jobs (priority DESC, started DESC, id{sql.claim_covers})
        WHERE state = 'ready' AND paused = 0
    """
    yield "CREATE INDEX jobs_loaded ON jobs (experiment_id, fold, id) WHERE state = 'ready' AND paused = 0"
    yield "CREATE INDEX jobs_leased ON jobs (session_id, lease_expires_at) WHERE state = 'leased'"
    yield "CREATE INDEX jobs_error ON jobs (changed_at) WHERE error IS NOT NULL"
    if sql.board_index:
        # The dashboard's query reads only this index, and never the table.
        columns = "experiment_id, fold, epoch, state, kind, paused, val_mae, test_mae, seconds"
        yield f"CREATE INDEX jobs_board ON jobs ({columns})"
    yield f"""
        CREATE TABLE needs (
            job_id {sql.bigint} NOT NULL REFERENCES jobs (id),
            needed_id {sql.bigint} NOT NULL REFERENCES jobs (id),
            PRIMARY KEY (job_id, needed_id)
        ){sql.keyed_table}
    """
    yield "CREATE INDEX needs_needed ON needs (needed_id)"
    yield f"""
        CREATE TABLE transitions (
            from_state {sql.text} NOT NULL,
            to_state {sql.text} NOT NULL,
            reason {sql.text} NOT NULL,
            PRIMARY KEY (from_state, to_state)
        ){sql.keyed_table}
    """
    yield f"""
        CREATE TABLE events (
            id {sql.row_id},
            at {sql.real} NOT NULL,
            job_id {sql.bigint}{sql.event_of("jobs")},
            experiment_id {sql.bigint}{sql.event_of("experiments")},
            by {sql.text} NOT NULL,
            from_state {sql.text},
            to_state {sql.text},
            why {sql.text} NOT NULL
        ){sql.table}
    """
    yield """
        CREATE VIEW job_rows AS
        SELECT jobs.*, experiments.name AS experiment
        FROM jobs JOIN experiments ON experiments.id = jobs.experiment_id
    """
    yield """
        CREATE VIEW event_rows AS
        SELECT events.*, experiments.name AS experiment, jobs.kind, jobs.fold, jobs.epoch
        FROM events
        LEFT JOIN jobs ON jobs.id = events.job_id
        LEFT JOIN experiments ON experiments.id = events.experiment_id
    """
    yield commits_place(sql)


def _jobs(sql: Dialect) -> str:
    checks = {name: sql.job_check(condition) for name, condition in column_checks(sql).items()}
    together = "".join(f",{check}" for check in map(sql.job_check, row_checks()) if check)
    return f"""
        CREATE TABLE jobs (
            id {sql.row_id},
            experiment_id {sql.bigint} NOT NULL REFERENCES experiments (id),
            kind {sql.text} NOT NULL{checks["kind"]},
            fold {sql.integer},
            epoch {sql.integer},
            state {sql.text} NOT NULL,
            priority {sql.integer} NOT NULL,
            paused {sql.integer} NOT NULL DEFAULT 0,
            started {sql.integer} NOT NULL DEFAULT 0,
            fence {sql.bigint} NOT NULL DEFAULT 0,
            session_id {sql.text} REFERENCES sessions (id),
            lease_expires_at {sql.real},
            affinity {sql.text} REFERENCES sessions (id),
            failures {sql.integer} NOT NULL DEFAULT 0,
            preemptions {sql.integer} NOT NULL DEFAULT 0,
            lost_in_a_row {sql.integer} NOT NULL DEFAULT 0,
            not_before {sql.real} NOT NULL DEFAULT 0,
            enqueued_at {sql.real} NOT NULL,
            changed_at {sql.real} NOT NULL,
            changed_by {sql.text} NOT NULL,
            changed_why {sql.text} NOT NULL,
            progress {sql.text}{checks["progress"]},
            result {sql.text}{checks["result"]},
            error {sql.text},
            val_mae {sql.real}{checks["val_mae"]},
            test_mae {sql.real}{checks["test_mae"]},
            seconds {sql.real}{checks["seconds"]}{together}
        ){sql.often_changed}
    """


def commits_place(sql: Dialect) -> str:
    """The statement that creates the table of `mbqueue.queue.commits_place`, which has at most one row."""
    return f"""
        CREATE TABLE commits_place (
            number {sql.integer} PRIMARY KEY CHECK (number = 1),
            id {sql.text} NOT NULL,
            kind {sql.text} NOT NULL CHECK (kind IN ('store', 'folder')),
            address {sql.text} NOT NULL,
            since {sql.real} NOT NULL,
            by {sql.text} NOT NULL
        ){sql.table}
    """


def require_known(version: int, *, name: object) -> None:
    """Reject a database whose schema version is newer than this program's.

    Raises:
        SchemaTooNew: if ``version`` is newer than `SCHEMA_VERSION`.
    """
    if version > SCHEMA_VERSION:
        raise SchemaTooNew(
            f"A newer mbqueue wrote {name}: the queue has schema version {version}, but this mbqueue only knows "
            f"versions up to {SCHEMA_VERSION}. Nothing was changed. Upgrade with: pip install --upgrade mbqueue"
        )

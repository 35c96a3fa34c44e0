"""Statements that a connection to PostgreSQL has planned: used again, never mixed up, never needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from postgres_server import PostgresServer

from mbqueue.queue import Lease
from mbqueue.queue.postgresql.plans import Plans
from mbqueue.queue.postgresql.store import PostgresQueue

Next = Callable[[], Lease | None]


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.url()


@pytest.fixture
def queue(url: str) -> Iterator[PostgresQueue]:
    with PostgresQueue(url) as queue:
        yield queue


@pytest.fixture
def finish(queue: PostgresQueue, make_spec: Callable[..., Any]) -> Callable[[], int | None]:
    """Commits the job at hand and claims the next: gives that one's epoch."""
    queue.enqueue(make_spec(folds=(0,), epochs=30), results_dir="r", now=0.0)
    session = queue.start_session(device="cpu", now=0.0, alive_seconds=3600)
    lease = queue.claim(session, now=0.0, lease_seconds=60)

    def commit_and_claim() -> int | None:
        nonlocal lease
        assert lease is not None
        result = {"dataset_hash": "d", "val_mae": 0.03}
        lease = queue.commit_and_claim(lease, result=result, now=0.0, lease_seconds=60)
        return None if lease is None else lease.job.epoch

    for epoch in range(1, 6):
        assert commit_and_claim() == epoch
    return commit_and_claim


def on_its_connection(queue: PostgresQueue, statement: str) -> Any:
    connection = queue.database._client().connection
    assert connection is not None
    cursor = connection.execute(statement.encode())
    return cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else None


def test_what_a_worker_does_for_every_job_is_planned_once(queue, finish):
    planned = on_its_connection(queue, "SELECT name, statement FROM pg_prepared_statements")
    assert any("state = 'leased', fence = fence + 1" in statement for _, statement in planned)
    assert any("state = 'committed'" in statement for _, statement in planned)
    for epoch in range(6, 12):
        assert finish() == epoch
    assert on_its_connection(queue, "SELECT name, statement FROM pg_prepared_statements") == planned


@pytest.mark.parametrize(
    "change", ["DEALLOCATE ALL", "ALTER TABLE mbqueue_x.jobs ADD COLUMN later text"], ids=["gone", "outdated"]
)
def test_a_planned_statement_that_cannot_be_used_costs_no_job(queue, finish, change):
    schema = queue.database.address.schema
    on_its_connection(queue, change.replace("mbqueue_x", schema))
    for epoch in range(6, 12):
        assert finish() == epoch
    assert queue.database._client().plans is None
    commits = [event.epoch for event in queue.events(limit=1000) if event.to_state == "committed" and event.epoch]
    assert commits == list(range(1, 11))


def test_another_connection_plans_under_other_names(queue, url, finish):
    (first,) = on_its_connection(queue, "SELECT name FROM pg_prepared_statements LIMIT 1")[0]
    with PostgresQueue(url) as other:
        for _ in range(3):
            other.pause("full", now=0.0)
            other.resume("full", now=0.0)
        names = [name for (name,) in on_its_connection(other, "SELECT name FROM pg_prepared_statements")]
    assert names
    assert not {name.rpartition(" ")[0] for name in names} & {first.rpartition(" ")[0]}


def test_a_plan_that_failed_to_be_made_gets_another_name(postgres_server):
    plans = Plans("me")
    with psycopg.connect(postgres_server.url().partition("?")[0]) as connection:
        cursor = psycopg.ClientCursor(connection)
        text = lambda *values: plans.text(cursor, "SELECT :a || '?' || :b || :a", dict(zip("ab", values, strict=True)))  # noqa: E731
        assert text("x", "y") == "SELECT 'x' || '?' || 'y' || 'x'"
        made = "PREPARE \"me {}\" (text, text) AS SELECT $1 || '?' || $2 || $1;EXECUTE \"me {}\" ('x', 'y')"
        assert text("x", "y") == made.format(1, 1)
        plans.forget()
        assert text("x", "y") == made.format(2, 2)
        plans.keep()
        assert text("u", "v") == "EXECUTE \"me 2\" ('u', 'v')"
        # The same words with other types are another statement; None has no type, so it is never planned.
        assert text("u", 1) == "SELECT 'u' || '?' || 1 || 'u'"
        assert text("u", 1).startswith('PREPARE "me 3" (text, bigint) AS')
        assert text(None, "v") == "SELECT NULL || '?' || 'v' || NULL"
        assert text(None, "v") == "SELECT NULL || '?' || 'v' || NULL"

"""The database enforces the transition table."""

from __future__ import annotations

import itertools

import pytest

from mbqueue.errors import ForbiddenTransition, QueueError
from mbqueue.queue import Queue, State
from mbqueue.queue.transitions import TRANSITIONS, mermaid

# For each state, SQL that sets a job's other columns to values that the CHECK constraints allow.
_SHAPES = {
    State.LEASED: "fence = fence + 1, session_id = (SELECT id FROM sessions), lease_expires_at = 1, result = NULL",
    State.COMMITTED: "session_id = NULL, lease_expires_at = NULL, result = '{}'",
}
_BARE = "session_id = NULL, lease_expires_at = NULL, result = NULL"

# State → the transitions that lead to it from `waiting`.
_WAYS = {
    State.WAITING: [],
    State.READY: [State.READY],
    State.LEASED: [State.READY, State.LEASED],
    State.COMMITTED: [State.READY, State.LEASED, State.COMMITTED],
    State.FAILED: [State.READY, State.LEASED, State.FAILED],
    State.SKIPPED: [State.SKIPPED],
    State.CANCELLED: [State.CANCELLED],
}


@pytest.fixture
def queue(tmp_path) -> Queue:
    return Queue(tmp_path / "queue.db")


def _set(db, job_id, state):
    db.execute(f"UPDATE jobs SET state = ?, {_SHAPES.get(state, _BARE)} WHERE id = ?", (state.value, job_id))


@pytest.mark.parametrize(("from_state", "to_state"), list(itertools.product(State, State)))
def test_the_database_allows_exactly_what_the_table_allows(world, from_state, to_state):
    world.enqueue()
    world.session()
    job = world.find("full fold 0 epoch 1")
    with world.queue.writing() as db:
        for state in _WAYS[from_state]:
            _set(db, job.id, state)
    if any((row.from_state, row.to_state) == (from_state, to_state) for row in TRANSITIONS):
        with world.queue.writing() as db:
            _set(db, job.id, to_state)
        assert world.queue.job(job.id).state is to_state
        last = world.queue.events()[-1]
        assert (last.job_id, last.from_state, last.to_state) == (job.id, from_state, to_state)
    else:
        events = world.queue.events()
        with pytest.raises(ForbiddenTransition, match="Nothing was changed"), world.queue.writing() as db:
            _set(db, job.id, to_state)
        assert world.queue.job(job.id).state is from_state
        assert world.queue.events() == events


@pytest.mark.parametrize(
    ("statement", "claim"),
    [
        ("UPDATE jobs SET fence = fence - 1 WHERE kind = 'prepare'", "a fence never falls"),
        (
            "UPDATE jobs SET state = 'leased', session_id = (SELECT id FROM sessions), lease_expires_at = 1 "
            "WHERE kind = 'prepare'",
            "a claim raises the fence by one",
        ),
        ("DELETE FROM jobs", "a job is never deleted"),
        (
            "INSERT INTO jobs (experiment_id, kind, fold, epoch, state, priority, enqueued_at, changed_at, changed_by, "
            "changed_why) VALUES (1, 'train', 4, 1, 'ready', 0, 0, 0, '', '')",
            "a new job is waiting",
        ),
    ],
)
def test_the_database_refuses_changes_that_no_code_may_make(world, statement, claim):
    world.enqueue()
    world.session()
    before = world.queue.jobs()
    with pytest.raises(ForbiddenTransition, match=claim), world.queue.writing() as db:
        db.execute(statement)
    assert world.queue.jobs() == before


_A_LEASE = "state = 'leased', fence = fence + 1, session_id = (SELECT id FROM sessions), lease_expires_at = 1"


@pytest.mark.parametrize(
    "change",
    [
        "kind = 'dance'",
        "fold = 0",
        "epoch = 1",
        "session_id = (SELECT id FROM sessions)",
        "lease_expires_at = 1",
        "result = '{}'",
        "progress = 'no JSON'",
        "val_mae = 0.5",
        _A_LEASE.replace("lease_expires_at", "not_before"),
        _A_LEASE.replace("(SELECT id FROM sessions)", "NULL"),
        "session_id = 'stranger', " + _A_LEASE.replace("session_id = (SELECT id FROM sessions), ", ""),
    ],
)
def test_the_database_refuses_a_job_that_cannot_be(world, change):
    world.enqueue()
    world.session()
    before = world.queue.jobs()
    with pytest.raises(QueueError, match="Nothing was changed"), world.queue.writing() as db:
        db.execute(f"UPDATE jobs SET {change} WHERE kind = 'prepare'")
    assert world.queue.jobs() == before


@pytest.mark.parametrize(
    "result",
    [
        "state = 'committed'",
        "state = 'committed', result = 'no JSON'",
        "state = 'committed', result = '{\"val_mae\": 0.5}'",
        "state = 'committed', result = '{\"val_mae\": 0.5}', val_mae = 0.25",
        "state = 'committed', result = '{}', test_mae = 0.5",
        "state = 'committed', result = '{}', seconds = 0.5",
        "result = '{}'",
    ],
)
def test_the_database_refuses_a_result_that_cannot_be(world, result):
    world.enqueue()
    world.take(world.session())
    before = world.queue.jobs()
    given_back = "" if result.startswith("result") else "session_id = NULL, lease_expires_at = NULL, "
    with pytest.raises(QueueError, match="Nothing was changed"), world.queue.writing() as db:
        db.execute(f"UPDATE jobs SET {given_back}{result} WHERE kind = 'prepare'")
    assert world.queue.jobs() == before


def test_the_database_refuses_a_second_job_for_the_same_epoch(world):
    world.enqueue()
    with pytest.raises(QueueError, match=r"(?i)unique"), world.queue.writing() as db:
        db.execute(
            "INSERT INTO jobs (experiment_id, kind, fold, epoch, state, priority, enqueued_at, changed_at, changed_by, "
            "changed_why) VALUES (1, 'train', 0, 1, 'waiting', 0, 0, 0, '', '')"
        )


def test_every_state_is_reachable_and_only_final_states_need_the_user():
    reached = {row.to_state for row in TRANSITIONS} | {State.WAITING}
    assert reached == set(State)
    assert len({(row.from_state, row.to_state) for row in TRANSITIONS}) == len(TRANSITIONS)


def test_the_diagram_shows_every_transition_once():
    lines = mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    arrows = [line.split(":")[0].strip() for line in lines[1:]]
    assert sorted(arrows) == sorted(
        ["[*] --> waiting", *(f"{row.from_state.value} --> {row.to_state.value}" for row in TRANSITIONS)]
    )

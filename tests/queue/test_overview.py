"""The overview behind `status --json`."""

from __future__ import annotations

import json

KEYS = {
    "": {"format", "project", "now", "experiments", "jobs", "sessions", "errors"},
    "experiments": {
        "name", "state", "paused", "priority", "dataset", "dataset_hash", "spec_hash", "enqueued_at", "results_dir",
        "jobs", "prepare", "record", "seconds", "folds",
    },
    "folds": {
        "fold", "state", "epochs_done", "epochs_skipped", "epochs_total", "best_val_mae", "best_epoch", "last_val_mae",
        "val_mae", "test_mae", "seconds", "jobs", "running",
    },
    "sessions": {
        "id", "state", "host", "pid", "device", "started_at", "heartbeat_at", "deadline_at", "structures_per_second",
        "job",
    },
    "errors": {"job", "experiment", "kind", "fold", "epoch", "state", "failures", "at", "retry_at", "error"},
}  # fmt: skip


def _overview(world, **options):
    overview = world.queue.overview(now=world.now, **options)
    assert json.loads(json.dumps(overview, allow_nan=False)) == overview
    return overview


def _fold(world, fold=0):
    return _overview(world)["experiments"][0]["folds"][fold]


def _trained(world, *val_mae, epochs=3):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=epochs)
    for value in val_mae:
        world.commit(world.take(session), val_mae=value, seconds=10.0)
    return session


def test_the_format_is_the_documented_one(world):
    session = _trained(world, 0.1)
    world.queue.fail(world.take(session), error="boom", now=world.now)
    overview = _overview(world, project="/p")
    assert set(overview) == KEYS[""]
    assert (overview["format"], overview["project"]) == (1, "/p")
    for part in ("experiments", "sessions", "errors"):
        assert set(overview[part][0]) == KEYS[part]
    assert set(overview["experiments"][0]["folds"][0]) == KEYS["folds"]


def test_an_empty_queue_has_an_overview(world):
    overview = _overview(world)
    assert (overview["experiments"], overview["sessions"], overview["errors"]) == ([], [], [])
    assert set(overview["jobs"].values()) == {0}


def test_a_fold_shows_its_epochs_and_its_best_one(world):
    _trained(world, 0.3, 0.1, 0.2)
    fold = _fold(world)
    assert (fold["epochs_done"], fold["epochs_total"], fold["val_mae"]) == (3, 3, [0.3, 0.1, 0.2])
    assert (fold["best_val_mae"], fold["best_epoch"], fold["last_val_mae"], fold["seconds"]) == (0.1, 2, 0.2, 30.0)


def test_validation_errors_come_back_to_the_last_bit(world):
    values = [1 / 3, 0.1 + 0.2, 1e-7 / 3]
    _trained(world, *values)
    assert _fold(world)["val_mae"] == values


def test_epochs_come_in_order_beyond_nine(world):
    values = [1.0 - epoch / 100 for epoch in range(12)]
    _trained(world, *values, epochs=12)
    assert _fold(world)["val_mae"] == values


def test_the_test_error_is_there_after_predict(world):
    session = _trained(world, 0.3, epochs=1)
    assert _fold(world)["test_mae"] is None
    world.commit(world.take(session), test_mae=0.0171)
    assert (_fold(world)["test_mae"], _fold(world)["state"]) == (0.0171, "done")


def test_a_running_job_shows_who_does_it_and_how_far_it_is(world):
    session = _trained(world, 0.3)
    lease = world.take(session)
    world.queue.renew(lease, now=world.now, lease_seconds=60, progress={"done": 3, "total": 9})
    running = _fold(world)["running"]
    assert (running["epoch"], running["session"], running["progress"]) == (2, session, {"done": 3, "total": 9})
    (row,) = _overview(world)["sessions"]
    assert (row["state"], row["job"]["epoch"], row["job"]["progress"]) == ("live", 2, {"done": 3, "total": 9})


def test_a_fold_says_what_state_it_is_in(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    assert _fold(world)["state"] == "ready"
    world.queue.pause("full", now=world.now)
    assert _fold(world)["state"] == "paused"
    world.queue.resume("full", now=world.now)
    lease = world.take(session)
    assert _fold(world)["state"] == "running"
    world.queue.fail(lease, error="boom", now=world.now, final=True)
    assert _fold(world)["state"] == "failed"
    world.queue.retry("full", now=world.now)
    world.queue.cancel("full", now=world.now)
    assert _fold(world)["state"] == "cancelled"


def test_an_experiment_says_what_state_it_is_in(world):
    def state():
        return _overview(world)["experiments"][0]["state"]

    session = world.session()
    world.enqueue(folds=(0,), epochs=1)
    assert state() == "ready"
    lease = world.take(session)
    assert state() == "running"
    world.commit(lease)
    world.queue.pause("full", now=world.now)
    assert state() == "paused"
    world.queue.resume("full", now=world.now)
    world.queue.fail(world.take(session), error="boom", now=world.now, final=True)
    assert state() == "failed"
    world.queue.cancel("full", now=world.now)
    assert state() == "cancelled"
    world.queue.retry("full", now=world.now)
    world.finish(session)
    assert state() == "done"


def test_jobs_are_counted_by_state(world):
    session = _trained(world, 0.3)
    world.enqueue("other", folds=(0,), epochs=1)
    world.take(session)
    one, other = _overview(world)["experiments"]
    expected = {"waiting": 3, "ready": 0, "leased": 1, "committed": 2, "skipped": 0, "failed": 0, "cancelled": 0}
    assert one["jobs"] == expected
    total = {state: one["jobs"][state] + other["jobs"][state] for state in expected}
    assert _overview(world)["jobs"] == total


def test_one_experiment_can_be_asked_for(world):
    world.enqueue("a")
    world.enqueue("b", folds=(0,), epochs=1)
    overview = _overview(world, experiment="b")
    assert [one["name"] for one in overview["experiments"]] == ["b"]
    assert overview["jobs"] == overview["experiments"][0]["jobs"]
    assert _overview(world, experiment="c")["experiments"] == []


def test_a_session_that_is_no_longer_heard_of_is_lost_and_one_that_ended_is_gone(world):
    session = world.session()
    ended = world.session()
    world.queue.end_session(ended, reason="done", now=world.now)
    world.now += 100
    assert [(row["id"], row["state"]) for row in _overview(world)["sessions"]] == [(session, "lost")]
    world.now += 86_400
    assert _overview(world)["sessions"] == []


def test_an_error_is_shown_until_its_job_is_committed(world):
    session = _trained(world)
    world.queue.fail(world.take(session), error="Traceback\n  deep\nValueError: bang\n", now=world.now)
    (error,) = _overview(world)["errors"]
    assert (error["error"], error["failures"], error["retry_at"]) == ("ValueError: bang", 1, world.now + 30)
    world.now += 31
    world.commit(world.take(session))
    assert _overview(world)["errors"] == []

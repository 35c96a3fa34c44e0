"""The overview behind `status --json`."""

from __future__ import annotations

import json
import traceback
from dataclasses import replace

import pytest

from mbqueue.errors import InvalidCrystals
from mbqueue.queue import State
from mbqueue.queue.claiming import MAX_LOST_IN_A_ROW
from mbqueue.queue.processes import ProcessIdentity, boot_id, this_process

KEYS = {
    "": {"format", "project", "now", "experiments", "jobs", "sessions", "errors"},
    "experiments": {
        "name", "state", "paused", "priority", "dataset", "target", "dataset_hash", "spec_hash", "enqueued_at",
        "results_dir", "jobs", "prepare", "preparing", "record", "seconds", "folds", "trial", "chosen",
    },
    "folds": {
        "fold", "state", "epochs_done", "epochs_skipped", "epochs_total", "best_val_mae", "best_epoch", "last_val_mae",
        "val_mae", "test_mae", "test_rocauc", "seconds", "epoch_seconds", "jobs", "running",
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


def test_a_folds_state_is_derived_from_its_jobs(world):
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


def test_an_experiments_state_is_derived_from_its_folds(world):
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
    overview = _overview(world, experiments=["b"])
    assert [one["name"] for one in overview["experiments"]] == ["b"]
    assert overview["jobs"] == overview["experiments"][0]["jobs"]
    assert _overview(world, experiments=["c"])["experiments"] == []


def test_a_silent_session_is_lost_and_an_ended_one_is_left_out(world):
    session = world.session()
    ended = world.session()
    world.queue.end_session(ended, reason="done", now=world.now)
    world.now += 100
    assert [(row["id"], row["state"]) for row in _overview(world)["sessions"]] == [(session, "lost")]
    world.now += 86_400
    assert _overview(world)["sessions"] == []


#: A process that cannot exist: its pid is larger than Linux allows.
DEAD = ProcessIdentity(this_process().host, boot_id(), 2**22 + 1, 1)


def _at(world, *, identity=DEAD):
    session = world.queue.start_session(device="cpu", now=world.now, alive_seconds=60, identity=identity)
    return session, world.take(session)


def _preparing(world):
    world.enqueue(folds=(0,))
    return _at(world)


def _training(world):
    world.prepared(world.session(), folds=(0, 1))
    return _at(world)


def _predicting(world):
    world.prepared(world.session(), folds=(0,), epochs=0)
    return _at(world)


def _paused_meanwhile(world):
    session, lease = _training(world)
    world.queue.pause("full", fold=0, now=world.now)
    world.queue.pause("full", fold=1, now=world.now)
    return session, lease


def _once_too_often(world):
    me = world.session()
    session, lease = _training(world)
    for _ in range(MAX_LOST_IN_A_ROW - 1):
        world.queue.reap_dead(by=me, now=world.now)
        session, lease = _at(world)
    return session, lease


@pytest.mark.parametrize("working", [_preparing, _training, _predicting, _paused_meanwhile, _once_too_often])
def test_a_job_of_a_dead_process_is_shown_as_the_next_session_will_find_it(world, working):
    session, lease = working(world)
    shown = _overview(world)
    (row,) = (row for row in shown["sessions"] if row["id"] == session)
    assert (row["state"], row["job"]["id"]) == ("died", lease.job.id)
    assert shown["jobs"]["leased"] == 0
    assert world.queue.jobs(state=State.LEASED) != ()
    world.queue.reap_dead(by="me", now=world.now)
    found = _overview(world)
    assert (shown["experiments"], shown["jobs"]) == (found["experiments"], found["jobs"])


@pytest.mark.parametrize("boot", [None, "another-boot/pid:[1]"])
def test_a_process_on_another_machine_is_known_to_be_dead_only_by_its_silence(world, boot):
    world.prepared(world.session(), folds=(0,))
    session, lease = _at(world, identity=replace(DEAD, boot_id=boot))
    (row,) = (row for row in _overview(world)["sessions"] if row["id"] == session)
    assert row["state"] == "live"
    assert _fold(world)["running"]["job"] == lease.job.id


def test_a_dead_processs_job_of_another_experiment_does_not_affect_this_one(world):
    _training(world)
    world.enqueue("other", folds=(0,))
    (entry,) = _overview(world, experiments=["other"])["experiments"]
    assert (entry["state"], entry["jobs"]["ready"]) == ("ready", 1)


def test_an_error_is_shown_with_its_whole_message_not_its_last_line(world):
    try:
        try:
            int("x")
        except ValueError as error:
            raise InvalidCrystals("bad.csv", [("y", "no atoms")]) from error
    except InvalidCrystals:
        told = traceback.format_exc()
    world.queue.fail(world.take(_trained(world)), error=told, now=world.now)
    (error,) = _overview(world)["errors"]
    start = "mbqueue.errors.InvalidCrystals: 1 entry of bad.csv cannot be used: y: no atoms; Fix them (and run"
    assert error["error"].startswith(start)
    assert start in world.queue.events()[-1].why


def test_the_error_of_a_cancelled_job_is_not_shown(world):
    world.queue.fail(world.take(_trained(world)), error="ValueError: bang", now=world.now, final=True)
    assert len(_overview(world)["errors"]) == 1
    world.queue.cancel("full", now=world.now)
    assert _overview(world)["errors"] == []
    assert _overview(world, experiments=["full"])["errors"] == []


def test_the_errors_of_the_named_experiments_are_all_shown_even_if_others_have_newer_errors(world):
    session = world.session()
    names = [f"full.{number}" for number in range(7)]
    for name in names:
        world.prepared(session, name, folds=range(4), epochs=1)
        for _ in range(4):
            world.queue.fail(world.take(session), error=f"ValueError: {name}", now=world.now, final=True)
        world.now += 1
    overview = _overview(world, experiments=[names[0], names[2]])
    assert [one["name"] for one in overview["experiments"]] == [names[0], names[2]]
    assert overview["jobs"]["failed"] == 8
    assert [one["experiment"] for one in overview["errors"]] == [names[2]] * 4 + [names[0]] * 4
    assert len(_overview(world, experiments=names)["errors"]) == 28
    assert len(_overview(world)["errors"]) == 20


def test_an_error_is_shown_until_its_job_is_committed(world):
    session = _trained(world)
    world.queue.fail(world.take(session), error="Traceback\n  deep\nValueError: bang\n", now=world.now)
    (error,) = _overview(world)["errors"]
    assert (error["error"], error["failures"], error["retry_at"]) == ("ValueError: bang", 1, world.now + 30)
    world.now += 31
    world.commit(world.take(session))
    assert _overview(world)["errors"] == []

"""The queue is as fast with many jobs as with few."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from mbqueue.queue import Queue

N_LARGE, N_SMALL = 200, 2
EPOCHS = 19  # 5 × (19 + 1) + 2 = 102 jobs for each experiment


def _filled(path, spec, n_experiments) -> Queue:
    """Experiments of 102 jobs; half of them have five committed epochs and a claimable job per fold."""
    queue = Queue(path)
    for number in range(n_experiments):
        queue.enqueue(
            spec.model_copy(update={"name": f"x{number}"}),
            results_dir=f"results/x{number}",
            now=1.0,
            priority=number % 3,
        )
    session = queue.start_session(device="cpu", now=1.0, alive_seconds=1e9)
    with queue.writing() as db:  # write the rows directly, because thousands of commits would take too long
        for claims in ("kind = 'prepare'", *(f"epoch = {epoch}" for epoch in range(1, 6))):
            half = f"{claims} AND experiment_id % 2 = 0"
            db.execute(f"UPDATE jobs SET state = 'ready' WHERE state = 'waiting' AND {half}")
            db.execute(
                "UPDATE jobs SET state = 'leased', started = 1, fence = fence + 1, session_id = ?, "
                "lease_expires_at = 9 "
                f"WHERE state = 'ready' AND {half}",
                (session,),
            )
            db.execute(
                "UPDATE jobs SET state = 'committed', session_id = NULL, lease_expires_at = NULL, val_mae = 0.25, "
                "seconds = 400.0, result = json_object('epoch', epoch, 'val_mae', 0.25, 'seconds', 400.0, "
                "'device', 'NVIDIA L4', 'grad_norm', 1.5) "
                f"WHERE state = 'leased' AND {half}"
            )
        db.execute("UPDATE jobs SET state = 'ready' WHERE state = 'waiting' AND epoch = 6 AND experiment_id % 2 = 0")
    return queue


@pytest.fixture(scope="module")
def spec(make_spec):
    return make_spec("x", folds=(0, 1, 2, 3, 4), epochs=EPOCHS)


@pytest.fixture(scope="module")
def large(tmp_path_factory, spec) -> Queue:
    return _filled(tmp_path_factory.mktemp("large") / "queue.db", spec, N_LARGE)


@pytest.fixture
def small(tmp_path, spec) -> Queue:
    return _filled(tmp_path / "queue.db", spec, N_SMALL)


def _steps(queue, action):
    """The instructions that SQLite's virtual machine runs for `action`, which do not depend on the computer's speed."""
    every, taken = 10, itertools.count()
    with queue.reading() as db:
        connection = db.connection  # `action` uses the same connection, because it runs in the same thread
    connection.set_progress_handler(lambda: next(taken) < 0, every)
    try:
        action()
    finally:
        connection.set_progress_handler(None, 0)
    return every * next(taken)


def test_the_overview_of_20_400_jobs_takes_as_many_steps_a_job_as_that_of_204(small, large):
    shown = large.overview(now=2.0)
    assert sum(shown["jobs"].values()) == 20_400
    assert shown["experiments"][1]["folds"][0]["epochs_done"] == 5
    few = _steps(small, lambda: small.overview(now=2.0)) / N_SMALL
    many = _steps(large, lambda: large.overview(now=2.0)) / N_LARGE
    assert many < 1.1 * few


def _worker(queue):
    """Start a session, and return a worker's actions by name; each action restores the queue's previous state."""
    session = queue.start_session(device="cpu", now=2.0, alive_seconds=1e9)
    claim = partial(queue.claim, session, now=2.0, lease_seconds=60)
    loaded = (2, 0)  # fold 0 of experiment 2, with five committed epochs

    def released(lease):
        queue.release(lease, reason="test", now=2.0)

    def committed():
        lease = claim(loaded=loaded)
        following = queue.commit_and_claim(lease, result={}, now=2.0, lease_seconds=60)
        queue.rewind(lease.job.experiment, {0: "test"}, to_epoch=5, now=2.0)
        return following

    def ended():
        other = queue.start_session(device="cpu", now=2.0, alive_seconds=1e9)
        queue.claim(other, now=2.0, lease_seconds=60)
        queue.end_session(other, reason="test", now=2.0)

    return {
        "claim": lambda: released(claim()),
        "claim of the fold that is loaded": lambda: released(claim(loaded=loaded)),
        "commit and claim": committed,
        "end of a session": ended,
        "taking back": lambda: queue.reap_expired(by="test", now=2.0),
    }


@pytest.mark.parametrize(
    "action", ["claim", "claim of the fold that is loaded", "commit and claim", "end of a session", "taking back"]
)
def test_a_worker_takes_no_more_steps_among_20_400_jobs_than_among_204(small, large, action):
    assert _steps(large, _worker(large)[action]) < 1.2 * _steps(small, _worker(small)[action])


def test_an_epoch_is_enqueued_in_as_many_steps_in_a_fold_of_400_as_in_one_of_50(tmp_path, make_spec):
    queue = Queue(tmp_path / "queue.db")

    def steps(name, epochs):
        spec = make_spec(name, folds=(0, 1), epochs=epochs)
        return _steps(queue, lambda: queue.enqueue(spec, results_dir=name, now=1.0)) / epochs

    assert steps("long", 400) < 1.2 * steps("short", 50)

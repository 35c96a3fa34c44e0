"""The queue is as quick with many jobs as with few."""

from __future__ import annotations

import itertools
import re

import pytest

from mbqueue.queue import Queue, claiming, edges, leases, overview, sessions

N_LARGE, N_SMALL = 1000, 2
EPOCHS = 19  # 5 × (19 + 1) + 2 = 102 jobs for each experiment


def _filled(path, spec, n_experiments) -> Queue:
    """102 jobs an experiment; in half of them all folds can be claimed, and five epochs of each are committed."""
    queue = Queue(path)
    for number in range(n_experiments):
        queue.enqueue(
            spec.model_copy(update={"name": f"x{number}"}),
            results_dir=f"results/x{number}",
            now=1.0,
            priority=number % 3,
        )
    session = queue.start_session(device="cpu", now=1.0, alive_seconds=1e9)
    with queue.writing() as db:  # as thousands of commits would have left it
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


def _plan(queue, statement):
    names = dict.fromkeys(re.findall(r":(\w+)", statement))
    with queue.reading() as db:
        return [row["detail"] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", names)]


@pytest.mark.parametrize(
    "statement",
    [
        claiming._CLAIM,
        claiming._CLAIM_NEXT,
        claiming._REAP,
        leases._COMMIT,
        leases._UNLOCK,
        leases._RENEW,
        edges.SKIP_LATER_EPOCHS,
        sessions._GIVE_BACK,
    ],
    ids=["claim", "claim next", "reap", "commit", "unlock", "renew", "skip", "give back"],
)
def test_no_statement_of_a_worker_reads_the_table_of_jobs_from_end_to_end_or_sorts_it(large, statement):
    for step in _plan(large, statement):
        assert "TEMP B-TREE" not in step
        # Walking these two indexes from the head is the point: the first holds only what can be claimed and ends at
        # the first hit, the second holds only what is leased.
        if step.startswith("SCAN"):
            assert re.search(r"USING (COVERING )?INDEX jobs_(claim|leased)\b", step), step


def test_what_an_epoch_needs_is_looked_up_and_not_searched_for_in_its_whole_fold(large):
    for link in edges._LINKS[1:3]:
        steps = [step for step in _plan(large, link) if " earlier " in step]
        assert steps == [
            "SEARCH earlier USING INDEX jobs_identity (experiment_id=? AND kind=? AND <expr>=? AND <expr>=?)"
        ]


def test_the_overview_reads_one_index_and_sorts_nothing(large):
    (step,) = _plan(large, overview._BOARD["sqlite"])
    assert "COVERING INDEX jobs_board" in step


def _steps(queue, action):
    """How many instructions SQLite's virtual machine takes for `action`: its work, whatever the machine's speed."""
    every, taken = 10, itertools.count()
    with queue.reading() as db:
        connection = db  # this thread's, which `action` uses too
    connection.set_progress_handler(lambda: next(taken) < 0, every)
    try:
        action()
    finally:
        connection.set_progress_handler(None, 0)
    return every * next(taken)


def test_the_overview_of_102_000_jobs_takes_as_many_steps_a_job_as_that_of_204(small, large):
    shown = large.overview(now=2.0)
    assert sum(shown["jobs"].values()) == 102_000
    assert shown["experiments"][1]["folds"][0]["epochs_done"] == 5
    few = _steps(small, lambda: small.overview(now=2.0)) / N_SMALL
    many = _steps(large, lambda: large.overview(now=2.0)) / N_LARGE
    assert many < 1.1 * few


def test_a_claim_among_102_000_jobs_takes_no_more_steps_than_among_204(small, large):
    def steps(queue):
        session = queue.start_session(device="cpu", now=2.0, alive_seconds=1e9)

        def claim_and_release():
            queue.release(queue.claim(session, now=2.0, lease_seconds=60), reason="test", now=2.0)

        return _steps(queue, claim_and_release)

    assert steps(large) < 1.1 * steps(small)

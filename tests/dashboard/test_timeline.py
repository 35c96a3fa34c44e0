"""The timeline of sessions, built from the events of a real queue."""

from __future__ import annotations

import pytest

from mbqueue.dashboard.timeline import timeline
from mbqueue.experiment import Spec
from mbqueue.queue.jobs import LOADED_NOTE, published_note
from mbqueue.queue.processes import ProcessIdentity, boot_id
from mbqueue.queue.store import Queue


@pytest.fixture
def queue(tmp_path):
    queue = Queue(tmp_path / "queue.db")
    queue.enqueue(Spec(name="small", folds=(0,), train={"epochs": 2}), results_dir="r", now=0.0)
    return queue


def start(queue, now, *, alive_seconds=1000.0):
    return queue.start_session(device="L4", now=now, alive_seconds=alive_seconds)


def drawn(queue, now=1000.0):
    spans = timeline(queue.sessions(), queue.events(limit=1000), now=now)
    return [(span.kind, span.label, span.start, span.end) for span in spans]


def prepare(queue, session, at):
    lease = queue.claim(session, now=at, lease_seconds=100)
    queue.commit(lease, result={"dataset_hash": "ab"}, now=at + 10)


def test_work_is_drawn_from_claim_to_commit_and_the_rest_is_idle(queue):
    session = start(queue, 100.0)
    prepare(queue, session, 110.0)
    queue.commit(queue.claim(session, now=120.0, lease_seconds=100), result={}, now=150.0)
    queue.end_session(session, reason="nothing left", now=160.0)
    assert drawn(queue) == [
        ("idle", "", 100.0, 110.0),
        ("prepare", "small", 110.0, 120.0),
        ("train", "small fold 0 epoch 1", 120.0, 150.0),
        ("idle", "", 150.0, 160.0),
    ]


def test_time_of_a_released_job_counts_as_work(queue):
    session = start(queue, 0.0)
    queue.release(queue.claim(session, now=0.0, lease_seconds=100), reason="deadline", now=40.0)
    queue.end_session(session, reason="deadline", now=40.0)
    assert drawn(queue) == [("prepare", "small", 0.0, 40.0)]


def test_a_failure_is_drawn_as_one(queue):
    session = start(queue, 0.0)
    queue.fail(queue.claim(session, now=0.0, lease_seconds=100), error="Traceback\nOSError: disk full", now=30.0)
    queue.end_session(session, reason="stopped", now=30.0)
    assert drawn(queue) == [("failed", "small", 0.0, 30.0)]


def test_a_death_is_drawn_as_cut_off_until_the_session_was_last_believed_to_live(queue):
    dead = queue.start_session(
        device="L4", now=0.0, alive_seconds=60.0, identity=ProcessIdentity("here", boot_id(), 2**22 + 1, 1)
    )
    queue.claim(dead, now=5.0, lease_seconds=60)
    other = start(queue, 500.0)
    queue.reap_dead(by=other, now=500.0)
    queue.end_session(other, reason="stopped", now=500.0)
    assert drawn(queue) == [("idle", "", 0.0, 5.0), ("cut off", "small", 5.0, 65.0)]


def test_unfinished_work_ends_now(queue):
    session = start(queue, 0.0)
    queue.claim(session, now=0.0, lease_seconds=100)
    assert drawn(queue, now=70.0) == [("prepare", "small", 0.0, 70.0)]


def test_sessions_without_events_are_idle_throughout(queue):
    start(queue, 10.0, alive_seconds=30.0)
    assert drawn(queue) == [("idle", "", 10.0, 40.0)]


def test_loading_and_saving_are_shown_apart_from_the_work(queue):
    session = start(queue, 0.0)
    prepare(queue, session, 0.0)
    lease = queue.claim(session, now=10.0, lease_seconds=100)
    job = lease.job
    queue.note(LOADED_NOTE, by=session, now=25.0, experiment_id=job.experiment_id, job_id=job.id)
    queue.commit(lease, result={}, now=90.0)
    queue.end_session(session, reason="stopped", now=90.0)
    spans = timeline(
        queue.sessions(), queue.events(limit=1000), now=90.0, results={job.id: {"checkpoint_seconds": 5.0}}
    )
    assert [(span.kind, span.start, span.end) for span in spans] == [
        ("prepare", 0.0, 10.0),
        ("load", 10.0, 25.0),
        ("train", 25.0, 85.0),
        ("checkpoint", 85.0, 90.0),
    ]


def test_after_a_death_only_repeated_work_counts_as_lost(queue):
    first = start(queue, 0.0)
    prepare(queue, first, 0.0)
    dead = queue.start_session(
        device="L4", now=20.0, alive_seconds=100.0, identity=ProcessIdentity("here", boot_id(), 2**22 + 1, 1)
    )
    job = queue.claim(dead, now=20.0, lease_seconds=100).job
    other = start(queue, 120.0)
    queue.reap_dead(by=other, now=120.0)
    lease = queue.claim(other, now=120.0, lease_seconds=100)
    assert lease.job.id == job.id
    queue.commit(lease, result={}, now=180.0)
    # The two sessions trained for 100 s and 60 s, but the epoch took only 130 s, so 30 s of training were repeated.
    spans = timeline(queue.sessions(), queue.events(limit=1000), now=180.0, results={job.id: {"seconds": 130.0}})
    assert [(span.kind, span.start, span.end) for span in spans if span.session == dead] == [
        ("train", 20.0, 90.0),
        ("repeated", 90.0, 120.0),
    ]


def test_publishing_is_drawn_beside_the_work_and_takes_no_time_of_it(queue):
    session = start(queue, 0.0)
    prepare(queue, session, 0.0)
    queue.note(published_note(4.0), by=session, now=8.0)
    queue.end_session(session, reason="stopped", now=10.0)
    assert drawn(queue) == [("prepare", "small", 0.0, 10.0), ("publish", "", 4.0, 8.0)]

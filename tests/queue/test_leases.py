"""The holder of a lease may write; a previous holder may not."""

from __future__ import annotations

import pytest

from mbqueue.errors import LeaseLost, QueueError
from mbqueue.queue import State
from mbqueue.queue.claiming import MAX_LOST_IN_A_ROW
from mbqueue.queue.leases import LONGEST_RETRY_SECONDS, MAX_FAILURES, retry_delay_seconds

WRITES = {
    "renew": lambda world, lease, publish: world.queue.renew(lease, now=world.now, lease_seconds=60, publish=publish),
    "save_progress": lambda world, lease, publish: world.queue.save_progress(
        lease, progress={"step": 1}, publish=publish
    ),
    "commit": lambda world, lease, publish: world.queue.commit(
        lease, result={"val_mae": 1.0}, now=world.now, publish=publish
    ),
    "early stopping": lambda world, lease, publish: world.queue.commit(
        lease, result={"val_mae": 1.0}, skip_rest="no better", now=world.now, publish=publish
    ),
    "commit_and_claim": lambda world, lease, publish: both(world, lease, publish=publish),
    "release": lambda world, lease, publish: world.queue.release(lease, reason="late", now=world.now),
    "fail": lambda world, lease, publish: world.queue.fail(lease, error="late", now=world.now),
    "rewind": lambda world, lease, publish: world.queue.rewind(
        "full", {0: "late"}, to_epoch=0, now=world.now, lease=lease
    ),
}

LOSSES = {
    "reclaimed": lambda world, lease: (_pass(world, 61), world.take(world.session())),
    "reaped": lambda world, lease: (_pass(world, 61), world.queue.reap_expired(by="test", now=world.now)),
    "released": lambda world, lease: world.queue.release(lease, reason="test", now=world.now),
    "committed": lambda world, lease: world.commit(lease),
    "failed": lambda world, lease: world.queue.fail(lease, error="boom", now=world.now),
    "cancelled": lambda world, lease: world.queue.cancel("full", now=world.now),
    "rewound": lambda world, lease: world.queue.rewind("full", {0: "test"}, to_epoch=0, now=world.now),
    "session ended": lambda world, lease: world.queue.end_session(lease.session, reason="test", now=world.now),
}


def _pass(world, seconds):
    world.now += seconds


def _ready(world):
    return [job.label for job in world.queue.jobs(state=State.READY)]


def _epoch_one(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    return world.take(session)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("write", WRITES)
def test_a_former_holder_changes_nothing_and_publishes_nothing(world, write, loss):
    lease = _epoch_one(world)
    LOSSES[loss](world, lease)
    before, events, published = world.queue.jobs(), world.queue.events(), []
    with pytest.raises(LeaseLost, match="full fold 0 epoch 1"):
        WRITES[write](world, lease, lambda: published.append(1))
    assert (world.queue.jobs(), world.queue.events(), published) == (before, events, [])


def test_an_expired_lease_can_be_renewed_until_it_is_reaped(world):
    lease = _epoch_one(world)
    world.now += 1000
    renewed = world.queue.renew(lease, now=world.now, lease_seconds=60)
    assert (renewed.fence, renewed.job.lease_expires_at) == (lease.fence, world.now + 60)
    assert world.claim(world.session()) is None


def test_a_renewed_lease_does_not_expire(world):
    lease = _epoch_one(world)
    other = world.session(alive_seconds=1e6)
    for _ in range(5):
        world.now += 50
        world.queue.renew(lease, now=world.now, lease_seconds=60)
        assert world.claim(other) is None
    world.commit(lease)


def test_renewing_without_progress_keeps_the_former_progress(world):
    lease = _epoch_one(world)
    world.queue.renew(lease, now=world.now, lease_seconds=60, progress={"step": 7})
    renewed = world.queue.renew(lease, now=world.now, lease_seconds=60)
    assert renewed.job.progress == {"step": 7}


def test_renewing_tells_the_holder_that_its_job_is_paused(world):
    lease = _epoch_one(world)
    assert not lease.job.paused
    world.queue.pause("full", now=world.now)
    assert world.queue.renew(lease, now=world.now, lease_seconds=60).job.paused


def test_an_expired_lease_counts_as_preemption_and_not_as_failure(world):
    lease = _epoch_one(world)
    world.now += 61
    again = world.take(world.session())
    assert again.job.id == lease.job.id
    assert (again.fence, again.job.preemptions, again.job.failures) == (lease.fence + 1, 1, 0)
    back, claimed = world.queue.events()[-2:]
    assert (back.from_state, back.to_state, back.why) == (
        "leased",
        "ready",
        f"lease of session {lease.session} ran out",
    )
    assert claimed.to_state == "leased"


def test_a_lease_from_a_clock_far_ahead_counts_as_expired(world):
    session = world.session()
    world.enqueue()
    world.now += 1e8
    world.take(session)
    world.now -= 1e8
    assert world.claim(world.session()) is not None


def test_a_claimant_whose_clock_is_behind_cannot_take_the_longest_lease(world):
    world.enqueue()
    world.take(world.session(), seconds=86_400)
    world.now -= 3600
    assert world.claim(world.session()) is None


def test_a_session_whose_clock_was_far_ahead_keeps_no_fold_to_itself(world):
    lost = world.session()
    world.prepared(lost, folds=(0,), epochs=2)
    world.now += 1e8
    world.commit(world.take(lost))
    world.now -= 1e8
    assert world.claim(world.session()) is not None


def test_a_retry_time_from_a_clock_far_ahead_is_due_at_once(world):
    lease = _epoch_one(world)
    world.queue.fail(lease, error="boom", now=world.now + 1e8)
    assert world.claim(world.session()) is not None


def test_commit_writes_the_result_and_makes_waiting_jobs_ready(world):
    lease = _epoch_one(world)
    world.queue.commit(lease, result={"epoch": 1, "val_mae": 0.04}, now=world.now)
    assert _ready(world) == ["full fold 0 epoch 2"]
    job = world.find("full fold 0 epoch 1")
    assert (job.state, job.result, job.session) == ("committed", {"epoch": 1, "val_mae": 0.04}, None)


def test_record_waits_for_the_last_fold(world):
    session = world.session()
    world.enqueue(folds=(0, 1), epochs=0)
    world.commit(world.take(session))
    world.commit(world.take(session))
    assert _ready(world) == ["full fold 1 predict"]
    world.commit(world.take(session))
    assert _ready(world) == ["full record"]


def test_publish_runs_while_no_other_session_can_take_the_job(world, open_queue):
    lease = _epoch_one(world)
    seen = []

    def publish():
        with open_queue().reading() as db:  # a second connection does not see the open transaction
            seen.append(db.execute("SELECT state FROM jobs WHERE id = ?", (lease.job.id,)).fetchone()["state"])

    world.queue.commit(lease, result={}, now=world.now, publish=publish)
    assert seen == ["leased"]
    assert world.find("full fold 0 epoch 1").state == "committed"


@pytest.mark.parametrize("write", ["commit", "renew", "save_progress", "early stopping"])
def test_when_publish_fails_nothing_is_written_and_the_lease_is_kept(world, write):
    lease = _epoch_one(world)
    before, events = world.queue.jobs(), world.queue.events()

    def publish():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        WRITES[write](world, lease, publish)
    assert (world.queue.jobs(), world.queue.events()) == (before, events)
    world.commit(lease)


def test_publish_must_not_access_the_queue(world):
    lease = _epoch_one(world)
    with pytest.raises(QueueError, match="may only move files"):
        world.queue.commit(lease, result={}, now=world.now, publish=world.queue.jobs)
    assert world.find("full fold 0 epoch 1").state == "leased"


def test_a_result_that_is_not_json_is_refused_and_the_lease_is_kept(world):
    lease = _epoch_one(world)
    for wrong in (float("nan"), object()):
        with pytest.raises(QueueError, match="not valid JSON"):
            world.queue.commit(lease, result={"val_mae": wrong}, now=world.now)
    world.commit(lease)


def test_prepare_sets_the_dataset_hash(world):
    session = world.session()
    world.enqueue()
    world.queue.commit(world.take(session), result={"dataset_hash": "abc"}, now=world.now)
    assert world.queue.experiment("full").dataset_hash == "abc"


def test_prepare_without_a_dataset_hash_is_refused(world):
    session = world.session()
    world.enqueue()
    with pytest.raises(QueueError, match="lacks dataset_hash"):
        world.queue.commit(world.take(session), result={}, now=world.now)
    assert world.states()["prepare"] == "leased"


def test_saved_progress_is_handed_to_the_next_holder(world):
    lease = _epoch_one(world)
    world.queue.save_progress(lease, progress={"step": 120, "steps": 400})
    world.now += 61
    assert world.take(world.session()).job.progress == {"step": 120, "steps": 400}


def test_a_release_is_no_failure_and_counts_as_preemption_only_after_one(world):
    lease = _epoch_one(world)
    world.queue.release(lease, reason="enough", now=world.now)
    job = world.queue.job(lease.job.id)
    assert (job.state, job.failures, job.preemptions, job.session) == ("ready", 0, 0, None)
    lease = world.take(lease.session)
    world.queue.release(lease, reason="deadline", now=world.now, preempted=True)
    job = world.queue.job(lease.job.id)
    assert (job.failures, job.preemptions) == (0, 1)
    assert world.queue.events()[-1].why == "released: deadline"


def test_a_failed_job_is_retried_after_growing_delays_and_then_fails_with_its_traceback(world):
    lease = _epoch_one(world)
    other = world.session(alive_seconds=1e9)
    delays = []
    for attempt in range(1, MAX_FAILURES):
        job = world.queue.fail(lease, error=f"Traceback\nValueError: bang {attempt}", now=world.now)
        assert (job.state, job.failures) == ("ready", attempt)
        delays.append(job.not_before - world.now)
        world.now = job.not_before - 1
        assert world.claim(other) is None
        world.now += 1
        lease = world.take(other)
    assert delays == [30, 120, 480, 1920]
    job = world.queue.fail(lease, error="Traceback\nValueError: bang 5", now=world.now)
    assert (job.state, job.failures, job.error) == ("failed", 5, "Traceback\nValueError: bang 5")
    assert world.queue.events()[-1].why == "failed (5 of 5): ValueError: bang 5"
    world.now += 1e6
    world.queue.heartbeat(other, now=world.now, alive_seconds=60)
    assert world.claim(other) is None


def test_no_delay_is_longer_than_an_hour():
    assert retry_delay_seconds(50) == LONGEST_RETRY_SECONDS


def test_a_final_failure_is_not_tried_again(world):
    lease = _epoch_one(world)
    job = world.queue.fail(lease, error="NonFiniteLoss: nan", now=world.now, final=True)
    assert (job.state, job.failures, job.not_before) == ("failed", 1, 0)


def test_a_failed_job_blocks_only_its_own_fold(world):
    session = world.session()
    world.prepared(session, folds=(0, 1), epochs=2)
    lease = world.take(session)
    world.queue.fail(lease, error="boom", now=world.now, final=True)
    assert world.finish(session) == ["full fold 1 epoch 1", "full fold 1 epoch 2", "full fold 1 predict"]
    assert world.states()["fold 0 epoch 2"] == "waiting"


def test_a_job_that_kills_every_holder_fails_in_the_end(world):
    _epoch_one(world)
    for _ in range(MAX_LOST_IN_A_ROW - 1):
        world.now += 61
        world.take(world.session())
    world.now += 61
    assert world.claim(world.session()) is None
    job = world.find("full fold 0 epoch 1")
    assert (job.state, job.failures, job.preemptions) == ("failed", 0, MAX_LOST_IN_A_ROW)
    assert "out of memory" in job.error


def test_a_job_that_saves_progress_may_be_interrupted_without_limit(world):
    lease = _epoch_one(world)
    for step in range(2 * MAX_LOST_IN_A_ROW):
        world.queue.save_progress(lease, progress={"step": step})
        world.now += 61
        lease = world.take(world.session())
    assert lease.job.preemptions == 2 * MAX_LOST_IN_A_ROW


def test_early_stopping_skips_the_rest_and_continues_with_predict(world):
    lease = _epoch_one(world)
    why = "3 epochs without a better one"
    world.queue.commit(lease, result={"val_mae": 0.1}, skip_rest=why, now=world.now)
    assert _ready(world) == ["full fold 0 predict"]
    states = world.states()
    assert [states[f"fold 0 epoch {epoch}"] for epoch in (1, 2, 3)] == ["committed", "skipped", "skipped"]
    assert world.finish(lease.session) == ["full fold 0 predict", "full record"]


def test_early_stopping_in_the_last_epoch_is_a_plain_commit(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=1)
    world.queue.commit(world.take(session), result={}, skip_rest="x", now=world.now)
    assert _ready(world) == ["full fold 0 predict"]


def test_only_training_can_stop_early(world):
    world.enqueue()
    with pytest.raises(QueueError, match="no later epochs"):
        world.queue.commit(world.take(world.session()), result={}, skip_rest="x", now=world.now)


# -- committing and claiming in one transaction ---


def both(world, lease, **options):
    result = {"dataset_hash": "d" * 64}
    return world.queue.commit_and_claim(lease, result=result, now=world.now, lease_seconds=60.0, **options)


def test_commit_and_claim_in_one_transaction_equals_both_in_turn(world) -> None:
    session = world.session()
    world.enqueue()
    lease = world.take(session)
    done = []
    while lease is not None:
        done.append(lease.job.label.removeprefix("full "))
        lease = both(world, lease)
    assert done == [
        "prepare",
        *("fold 0 epoch 1", "fold 0 epoch 2", "fold 0 predict"),
        *("fold 1 epoch 1", "fold 1 epoch 2", "fold 1 predict"),
        "record",
    ]
    assert set(world.states().values()) == {"committed"}


def test_the_next_job_of_a_fold_is_taken_as_it_waits_once_its_epoch_is_committed(world) -> None:
    session = world.session()
    world.prepared(session, folds=(0,))
    lease = world.take(session)
    last = world.queue.events(limit=1)[-1].id
    while lease is not None and lease.job.kind == "train":
        lease = both(world, lease)
    assert lease is not None
    assert (lease.job.label, lease.job.fence, lease.job.session) == ("full fold 0 predict", 1, session)
    assert lease.job.lease_expires_at == pytest.approx(world.now + 60.0)
    changes = [(event.epoch, event.from_state, event.to_state) for event in world.queue.events(after=last)]
    assert changes == [
        (1, "leased", "committed"),
        (2, "waiting", "leased"),
        (2, "leased", "committed"),
        (None, "waiting", "leased"),
    ]


def test_a_commit_with_a_claim_counts_as_a_heartbeat_of_a_session_that_was_not_heard_of_lately(world) -> None:
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    lease = world.take(session)
    heard = world.queue.session(session).heartbeat_at
    world.now += 25.0
    lease = both(world, lease)
    assert world.queue.session(session).heartbeat_at == heard
    world.now += 10.0
    lease = both(world, lease)
    assert lease is not None
    assert lease.job.epoch == 3
    assert world.queue.session(session).heartbeat_at == pytest.approx(heard + 35.0)
    assert world.queue.session(session).alive_until == pytest.approx(world.now + 60.0)


def test_a_job_that_needs_more_than_the_epoch_is_not_claimed_with_its_commit(world) -> None:
    session = world.session()
    world.prepared(session, folds=(0,))
    world.enqueue("other")
    needs = world.find("full fold 0 epoch 2").id, world.find("other prepare").id
    with world.queue.writing() as db:
        db.execute("INSERT INTO needs (job_id, needed_id) VALUES (?, ?)", needs)
    following = both(world, world.take(session))
    assert following is not None
    assert following.job.label == "other prepare"
    assert world.find("full fold 0 epoch 2").state == "waiting"


def test_a_commit_that_ends_a_fold_reaps_expired_leases(world) -> None:
    session, lost = world.session(), world.session()
    world.prepared(session, epochs=1)
    lease, left = world.take(session), world.take(lost)
    lease = both(world, lease)
    assert lease is not None
    assert lease.job.kind == "predict"
    world.now += 70.0
    following = both(world, lease)
    assert following is not None
    assert (following.job.id, following.fence) == (left.job.id, left.fence + 1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 86_401.0])
def test_a_commit_with_a_claim_for_no_time_or_too_long_does_nothing(world, seconds) -> None:
    session = world.session()
    world.prepared(session)
    lease = world.take(session)
    before = world.queue.jobs()
    with pytest.raises(QueueError, match="must last between 0 and"):
        world.queue.commit_and_claim(lease, result={}, now=world.now, lease_seconds=seconds)
    assert world.queue.jobs() == before


def test_a_commit_with_a_claim_leaves_folds_of_other_sessions_alone(world) -> None:
    first, second = world.session(), world.session()
    world.prepared(first)
    on_0, on_1 = world.take(first), world.take(second)
    after_0, after_1 = both(world, on_0), both(world, on_1)
    assert after_0 is not None
    assert after_1 is not None
    assert (after_0.job.fold, after_1.job.fold) == (0, 1)


def test_a_commit_with_a_claim_under_an_old_fence_writes_and_claims_nothing(world) -> None:
    session, thief = world.session(), world.session()
    world.prepared(session)
    lease = world.take(session)
    world.now += 120
    stolen = world.take(thief)
    assert stolen.job.id == lease.job.id
    before = world.queue.jobs()
    published = []
    with pytest.raises(LeaseLost):
        both(world, lease, publish=lambda: published.append("x"))
    assert (published, world.queue.jobs()) == ([], before)


def test_when_publishing_fails_the_commit_and_the_claim_are_undone_and_the_lease_is_held(world) -> None:
    session = world.session()
    world.prepared(session)
    lease = world.take(session)
    before = world.queue.jobs()

    def fail() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        both(world, lease, publish=fail)
    assert world.queue.jobs() == before
    assert both(world, lease) is not None


def test_a_commit_with_a_claim_skips_paused_jobs(world) -> None:
    session = world.session()
    world.prepared(session)
    lease = world.take(session)
    world.queue.pause("full", now=world.now)
    assert both(world, lease) is None
    assert world.find("full fold 0 epoch 1").state == "committed"
    assert world.find("full fold 0 epoch 2").state == "ready"


def test_early_stopping_and_the_next_claim_are_one_transaction_too(world) -> None:
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    following = both(world, world.take(session), skip_rest="no better")
    assert following is not None
    assert following.job.kind == "predict"
    assert world.states()["fold 0 epoch 3"] == "skipped"
    with pytest.raises(QueueError, match="no later epochs"):
        both(world, following, skip_rest="no better")


def test_the_last_commit_of_a_session_that_was_ended_by_others_claims_nothing(world) -> None:
    session = world.session()
    world.prepared(session)
    lease = world.take(session)
    world.queue.end_session(session, reason="ended", now=world.now)
    with pytest.raises(LeaseLost):
        both(world, lease)
    assert not world.queue.jobs(state=State.LEASED)


def test_changed_data_are_refused_when_prepared_again(world):
    session = world.session()
    world.enqueue(folds=(0,), epochs=0)
    world.queue.commit(world.take(session), result={"dataset_hash": "old"}, now=world.now)
    with world.queue.writing() as db:  # mbqueue itself never creates such a row
        db.execute("UPDATE jobs SET state = 'waiting', result = NULL WHERE kind = 'prepare'")
    world.queue.retry("full", now=world.now)
    with pytest.raises(QueueError, match="crystals of full have changed"):
        world.queue.commit(world.take(session), result={"dataset_hash": "new"}, now=world.now)
    assert world.queue.experiment("full").dataset_hash == "old"

"""Which job a claim returns, and to which session."""

from __future__ import annotations

import pytest

from mbqueue.errors import QueueError


def _loaded(lease):
    return (lease.job.experiment_id, lease.job.fold)


def test_an_empty_queue_gives_no_job(world):
    assert world.claim(world.session()) is None


def test_epochs_of_a_fold_come_in_order_and_folds_one_after_the_other(world):
    world.enqueue(folds=(0, 1), epochs=2)
    assert world.finish(world.session()) == [
        "full prepare",
        "full fold 0 epoch 1",
        "full fold 0 epoch 2",
        "full fold 0 predict",
        "full fold 1 epoch 1",
        "full fold 1 epoch 2",
        "full fold 1 predict",
        "full record",
    ]


def test_a_claim_raises_the_fence_and_names_the_holder(world):
    world.enqueue()
    session = world.session()
    lease = world.take(session)
    assert (lease.fence, lease.session, lease.job.lease_expires_at) == (1, session, world.now + 60)
    assert world.queue.job(lease.job.id).session == session
    world.queue.release(lease, reason="test", now=world.now)
    assert world.take(session).fence == 2


def test_a_job_released_for_others_is_not_left_to_its_former_session(world):
    one, two = world.session(), world.session()
    world.prepared(one, folds=(0,), epochs=3)
    world.queue.release(world.take(one), reason="test", now=world.now)
    assert world.claim(two) is None
    world.queue.release(world.take(one), reason="test", now=world.now, for_others=True)
    assert world.take(two).job.epoch == 1


def test_a_claim_can_leave_expired_leases_alone(world):
    world.enqueue()
    world.take(world.session())
    world.now += 1000
    patient = world.session()
    assert world.queue.claim(patient, now=world.now, lease_seconds=60, reap=False) is None
    assert world.queue.claim(patient, now=world.now, lease_seconds=60).fence == 2


def test_a_leased_job_is_not_claimed_twice(world):
    world.enqueue()
    assert world.claim(world.session()) is not None
    assert world.claim(world.session()) is None


def test_two_sessions_take_different_folds_and_keep_them(world):
    one, two = world.session(), world.session()
    world.prepared(one, folds=(0, 1), epochs=3)
    first, second = world.take(one), world.take(two)
    assert (first.job.fold, second.job.fold) == (0, 1)
    for epoch in (2, 3):
        world.commit(first)
        # Between session one's commit and its next claim, session two must not claim the fold.
        assert world.claim(two) is None
        first = world.take(one, loaded=_loaded(first))
        assert (first.job.fold, first.job.epoch) == (0, epoch)


def test_any_session_may_claim_a_fold_of_an_ended_session(world):
    one, two = world.session(), world.session()
    world.prepared(one, folds=(0,), epochs=2)
    world.commit(world.take(one))
    assert world.claim(two) is None
    world.queue.end_session(one, reason="deadline", now=world.now)
    assert world.take(two).job.epoch == 2


def test_any_session_may_claim_a_fold_of_a_silent_session(world):
    one, two = world.session(), world.session(alive_seconds=1e6)
    world.prepared(one, folds=(0,), epochs=2)
    world.commit(world.take(one))
    world.now += 61
    assert world.take(two).job.epoch == 2


def test_any_session_may_claim_a_fold_that_its_session_left(world):
    one, two = world.session(), world.session()
    world.prepared(one, folds=(0,), epochs=2)
    world.commit(world.take(one))
    world.enqueue("urgent", priority=5)
    assert world.take(one).job.experiment == "urgent"
    assert world.take(two).job.epoch == 2


def test_the_loaded_fold_comes_before_higher_priority(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    lease = world.take(session)
    world.commit(lease)
    world.enqueue("urgent", priority=5)
    assert world.take(session, loaded=_loaded(lease)).job.experiment == "full"


def test_higher_priority_comes_before_a_fold_in_progress(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    world.commit(world.take(session))
    world.enqueue("urgent", priority=5)
    assert world.take(session).job.experiment == "urgent"


def test_a_fold_in_progress_comes_before_an_older_new_one(world):
    session = world.session()
    world.prepared(session, folds=(0, 1), epochs=2)
    world.queue.pause("full", fold=0, now=world.now)
    world.commit(world.take(session))
    world.queue.resume("full", fold=0, now=world.now)
    assert (world.take(session).job.fold, world.find("full fold 0 epoch 1").state) == (1, "ready")


def test_with_equal_priority_the_older_experiment_comes_first(world):
    world.enqueue("older")
    world.now += 1
    world.enqueue("newer")
    assert world.take(world.session()).job.experiment == "older"


def test_a_claim_for_an_unknown_or_ended_session_is_an_error(world):
    world.enqueue()
    with pytest.raises(QueueError, match="never started"):
        world.claim("nobody")
    session = world.session()
    world.queue.end_session(session, reason="test", now=world.now)
    with pytest.raises(QueueError, match="has ended"):
        world.claim(session)
    assert world.states()["prepare"] == "ready"


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9])
def test_a_lease_of_impossible_length_is_refused(world, seconds):
    world.enqueue()
    with pytest.raises(QueueError, match="lease"):
        world.claim(world.session(), seconds=seconds)


def test_the_outlook_distinguishes_waiting_from_being_finished(world):
    session = world.session()
    world.enqueue(folds=(0,), epochs=0)
    assert (world.queue.outlook(now=world.now).ready, world.queue.outlook(now=world.now).is_exhausted) == (1, False)
    lease = world.take(session)
    outlook = world.queue.outlook(now=world.now)
    assert (outlook.leased, outlook.is_exhausted) == (1, False)
    world.queue.fail(lease, error="boom", now=world.now)
    outlook = world.queue.outlook(now=world.now)
    assert (outlook.delayed, outlook.is_exhausted) == (1, False)
    assert (outlook.next_retry, outlook.seconds_to_retry) == (world.find("full prepare"), 30)
    world.now += 31
    assert (world.queue.outlook(now=world.now).delayed, world.queue.outlook(now=world.now).next_retry) == (0, None)
    world.finish(session)
    assert world.queue.outlook(now=world.now).is_exhausted


def test_the_outlook_names_the_delayed_job_that_is_due_first(world):
    session = world.session()
    for name in ("late", "soon", "paused"):
        world.enqueue(name)
    for delay in (20, 0, 5):
        world.queue.fail(world.take(session), error="boom", now=world.now + delay)
    world.queue.pause("paused", now=world.now)
    outlook = world.queue.outlook(now=world.now)
    assert (outlook.delayed, outlook.next_retry.label, outlook.seconds_to_retry) == (2, "soon prepare", 30)


def test_a_queue_with_only_paused_jobs_is_exhausted(world):
    world.enqueue()
    world.queue.pause("full", now=world.now)
    assert world.queue.outlook(now=world.now).is_exhausted

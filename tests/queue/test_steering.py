"""User actions on jobs, and rewinding."""

from __future__ import annotations

import pytest

from mbqueue.errors import LeaseLost, RewoundBefore, UsageError
from mbqueue.queue.steering import MAX_REWINDS


def _trained(world, *, epochs=3, folds=(0,)):
    """Enqueue an experiment, and run all its jobs; return the session that ran them."""
    session = world.session(alive_seconds=1e9)
    world.enqueue(folds=folds, epochs=epochs)
    world.finish(session)
    return session


def test_no_job_of_a_paused_experiment_is_claimed_until_it_is_resumed(world):
    session = world.session()
    world.prepared(session)
    assert world.queue.pause("full", now=world.now) == 8
    assert world.queue.experiment("full").paused
    assert world.claim(session) is None
    world.queue.resume("full", now=world.now)
    assert world.claim(session) is not None


def test_pausing_one_fold_leaves_the_others_running(world):
    session = world.session()
    world.prepared(session, folds=(0, 1))
    world.queue.pause("full", fold=0, now=world.now)
    assert world.take(session).job.fold == 1
    assert not world.queue.experiment("full").paused


def test_a_running_job_may_still_commit_after_a_pause(world):
    session = world.session()
    world.prepared(session, folds=(0,))
    lease = world.take(session)
    world.queue.pause("full", now=world.now)
    world.commit(lease)
    assert world.claim(session) is None


def test_pausing_twice_changes_nothing_the_second_time(world):
    world.enqueue()
    world.queue.pause("full", now=world.now)
    events = world.queue.events()
    assert world.queue.pause("full", now=world.now) == 0
    assert world.queue.events() == events


def test_priority_decides_from_the_next_claim_on(world):
    world.enqueue("one")
    world.enqueue("two")
    world.queue.set_priority("two", 3, now=world.now)
    assert world.queue.experiment("two").priority == 3
    assert world.take(world.session()).job.experiment == "two"


@pytest.mark.parametrize("priority", [2**31, -(2**31), 10**20])
def test_a_priority_that_not_every_database_can_hold_is_refused(world, priority):
    world.enqueue("one", priority=2**31 - 1)
    world.queue.set_priority("one", -(2**31) + 1, now=world.now)
    with pytest.raises(UsageError, match="between -2147483647 and 2147483647"):
        world.queue.set_priority("one", priority, now=world.now)
    with pytest.raises(UsageError, match=f"priority of {priority}"):
        world.enqueue("two", priority=priority)
    assert [one.priority for one in world.queue.experiments()] == [-(2**31) + 1]


def test_cancel_drops_unfinished_jobs_and_keeps_committed_ones(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    lease = world.take(session)
    world.commit(lease)
    running = world.take(session)
    assert world.queue.cancel("full", now=world.now) == 3
    assert world.states() == {
        "prepare": "committed",
        "fold 0 epoch 1": "committed",
        "fold 0 epoch 2": "cancelled",
        "fold 0 predict": "cancelled",
        "record": "cancelled",
    }
    with pytest.raises(LeaseLost, match="cancelled"):
        world.queue.renew(running, now=world.now, lease_seconds=60)


def test_a_cancelled_experiment_resumes_after_a_retry(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    world.commit(world.take(session))
    world.queue.cancel("full", now=world.now)
    assert world.queue.retry("full", now=world.now) == 3
    assert world.finish(session) == ["full fold 0 epoch 2", "full fold 0 predict", "full record"]


def test_a_failed_fold_resumes_after_a_retry_with_all_its_attempts(world):
    session = world.session()
    world.prepared(session, folds=(0, 1), epochs=1)
    world.queue.fail(world.take(session), error="boom", now=world.now, final=True)
    world.finish(session)
    assert world.queue.retry("full", fold=0, now=world.now) == 1
    assert world.find("full fold 0 epoch 1").failures == 0
    assert world.finish(session) == ["full fold 0 epoch 1", "full fold 0 predict", "full record"]


def test_retry_ends_the_rest_after_a_failure(world):
    session = world.session()
    world.prepared(session, folds=(0,))
    world.queue.fail(world.take(session), error="boom", now=world.now)
    assert world.claim(session) is None
    assert world.queue.retry("full", now=world.now) == 1
    assert world.claim(session) is not None


def test_retrying_one_fold_leaves_the_others_cancelled(world):
    world.prepared(world.session(), folds=(0, 1))
    world.queue.cancel("full", now=world.now)
    world.queue.retry("full", fold=1, now=world.now)
    states = world.states()
    assert (states["fold 0 epoch 1"], states["fold 1 epoch 1"], states["record"]) == ("cancelled", "ready", "waiting")


@pytest.mark.parametrize("action", ["pause", "resume", "cancel", "retry"])
def test_an_unknown_experiment_or_fold_is_an_error(world, action):
    world.enqueue(folds=(0,))
    before = world.queue.jobs()
    with pytest.raises(UsageError, match="There is no experiment other"):
        getattr(world.queue, action)("other", now=world.now)
    with pytest.raises(UsageError, match="full has no fold 4"):
        getattr(world.queue, action)("full", fold=4, now=world.now)
    assert world.queue.jobs() == before


def test_every_action_leaves_an_event_that_names_its_author(world):
    world.enqueue()
    world.queue.pause("full", now=world.now, by="ada")
    world.queue.set_priority("full", 2, fold=1, now=world.now, by="bob")
    world.queue.cancel("full", fold=0, now=world.now, by="eve")
    events = [(event.by, event.why) for event in world.queue.events(experiment="full")]
    assert ("ada", "paused") in events
    assert ("bob", "fold 1 priority set to 2") in events
    assert ("eve", "cancelled") in events


def test_a_rewound_fold_is_trained_again_from_that_epoch(world):
    session = _trained(world)
    assert world.queue.rewind("full", {0: "e0002 is damaged"}, to_epoch=1, now=world.now) == 4
    assert world.states() == {
        "prepare": "committed",
        "fold 0 epoch 1": "committed",
        "fold 0 epoch 2": "ready",
        "fold 0 epoch 3": "waiting",
        "fold 0 predict": "waiting",
        "record": "waiting",
    }
    assert world.find("full fold 0 epoch 2").result is None
    assert world.finish(session) == [
        "full fold 0 epoch 2",
        "full fold 0 epoch 3",
        "full fold 0 predict",
        "full record",
    ]


def test_rewinding_leaves_other_folds_alone(world):
    _trained(world, folds=(0, 1))
    world.queue.rewind("full", {0: "all damaged"}, to_epoch=0, now=world.now)
    states = world.states()
    assert (states["fold 0 epoch 1"], states["fold 1 epoch 1"], states["fold 1 predict"]) == (
        "ready",
        "committed",
        "committed",
    )


def test_the_worker_that_finds_damage_releases_its_job_and_claims_the_earlier_one(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    world.commit(world.take(session))
    world.commit(world.take(session))
    lease = world.take(session)
    assert lease.job.epoch == 3
    world.queue.rewind("full", {0: "both are damaged"}, to_epoch=0, now=world.now, lease=lease)
    with pytest.raises(LeaseLost):
        world.commit(lease)
    assert world.take(session, loaded=(lease.job.experiment_id, 0)).job.epoch == 1


def test_rewinding_takes_the_job_from_the_session_that_holds_it(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    world.commit(world.take(session))
    running = world.take(session)
    world.queue.rewind("full", {0: "damaged"}, to_epoch=0, now=world.now)
    with pytest.raises(LeaseLost, match="waiting"):
        world.commit(running)


def test_rewinding_restores_epochs_skipped_by_early_stopping(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    world.commit(world.take(session))
    world.queue.commit(world.take(session), result={}, skip_rest="no better", now=world.now)
    world.queue.rewind("full", {0: "damaged"}, to_epoch=1, now=world.now)
    states = world.states()
    assert [states[f"fold 0 epoch {epoch}"] for epoch in (1, 2, 3)] == ["committed", "ready", "waiting"]


def find_damage(world, session, why):
    """Train a fold, and rewind it from its predict job as if the last epoch were damaged; return the job's lease."""
    lease = world.take(session)
    while lease.job.kind != "predict":
        world.commit(lease)
        lease = world.take(session)
    world.queue.rewind("full", {0: why}, to_epoch=1, now=world.now, lease=lease)
    return lease


def test_files_damaged_again_after_a_rebuild_are_not_rebuilt_a_third_time(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    find_damage(world, session, "no good")
    with pytest.raises(RewoundBefore, match=r"fold 0 predict: no good .*mbqueue retry full"):
        find_damage(world, session, "no good")
    assert world.states()["fold 0 predict"] == "leased", "its holder says what becomes of it"


def test_the_same_damage_may_be_found_again_after_a_commit_or_a_retry(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=2)
    for _ in range(2):
        find_damage(world, session, "no good")
        world.finish(session)
        world.queue.rewind("full", {0: "a person"}, to_epoch=1, now=world.now)
    find_damage(world, session, "no good")
    with pytest.raises(RewoundBefore):
        find_damage(world, session, "no good")
    lease = next(job for job in world.queue.jobs() if job.kind == "predict")
    assert lease.state == "leased"
    world.queue.cancel("full", now=world.now)
    world.queue.retry("full", now=world.now)
    find_damage(world, session, "no good")


def test_a_job_is_rewound_only_a_few_times_for_any_reasons_and_sessions(world):
    first = world.session()
    world.prepared(first, folds=(0,), epochs=2)
    world.queue.end_session(first, reason="it is over", now=world.now)
    for time in range(MAX_REWINDS):
        session = world.session()
        find_damage(world, session, f"reason {time % 2}")
        world.queue.end_session(session, reason="it is over", now=world.now)
    with pytest.raises(RewoundBefore, match=rf"damaged and recreated {MAX_REWINDS} times in a row"):
        find_damage(world, world.session(), "one more")

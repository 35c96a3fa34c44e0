"""A queue that adopts commits and sessions from other databases of the same project, or that is a copy of one."""

from __future__ import annotations

import pytest

from mbqueue.errors import QueueError, UsageError
from mbqueue.queue import Kind, State
from mbqueue.queue.adopting import Trained
from mbqueue.queue.claiming import LONGEST_LEASE_SECONDS
from mbqueue.queue.jobs import SeenSession


def row(epoch: int, val_mae: float = 0.5) -> dict[str, float]:
    return {"epoch": epoch, "val_mae": val_mae}


def trained(epochs: int, *, fold: int = 0, fence: int = 1, **options) -> Trained:
    history = options.pop("history", [row(epoch) for epoch in range(1, epochs + 1)])
    fields = {"is_within": False, "skip_rest": False, "source": "commit e.json", **options}
    return Trained(experiment="full", fold=fold, history=history, fence=fence, **fields)


def seen(session: str, *, alive_until: float) -> SeenSession:
    process = {"host": "elsewhere", "boot_id": "boot", "pid": 1, "pid_started": 1, "device": "L4"}
    return SeenSession(
        id=session, started_at=1.0, heartbeat_at=2.0, alive_until=alive_until, deadline_at=None, **process
    )


def commit_epochs(world, session, n: int, val_mae: float = 0.5) -> None:
    for epoch in range(1, n + 1):
        lease = world.take(session, loaded=(1, 0))
        world.queue.commit(lease, result={**row(epoch, val_mae), "best_epoch": 1}, now=world.now)


def test_the_epochs_of_a_chain_become_committed_with_its_rows_and_the_next_one_ready(world):
    world.prepared(world.session(), folds=(0,), epochs=3)
    assert world.queue.adopt(trained(2, fence=7), now=world.now)
    assert world.states() == {
        "prepare": "committed",
        "fold 0 epoch 1": "committed",
        "fold 0 epoch 2": "committed",
        "fold 0 epoch 3": "ready",
        "fold 0 predict": "waiting",
        "record": "waiting",
    }
    one, two = world.find("full fold 0 epoch 1"), world.find("full fold 0 epoch 2")
    assert (one.result, one.fence) == ({**row(1), "best_epoch": 1}, 0)
    assert (two.result, two.fence) == ({**row(2), "best_epoch": 1}, 7)
    assert world.queue.events()[-2].why == "fold 0: 2 epochs adopted from commit e.json"


def test_adopting_known_commits_changes_nothing(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    commit_epochs(world, session, 2)
    before, events = world.queue.jobs(), world.queue.events()
    assert world.queue.adopt(trained(2), now=world.now + 1)
    assert (world.queue.jobs(), world.queue.events()) == (before, events)


@pytest.mark.parametrize(
    "chain", [trained(1), trained(2, history=[row(1), row(2, 0.25)])], ids=["shorter", "other rows"]
)
def test_epochs_that_the_chain_lacks_are_rewound_with_the_predictions(world, chain):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    commit_epochs(world, session, 3)
    world.finish(session)
    assert world.queue.adopt(chain, now=world.now)
    states = world.states()
    assert [states[f"fold 0 epoch {epoch}"] for epoch in (1, 2, 3)] == [
        "committed",
        "ready" if len(chain.history) == 1 else "committed",
        "waiting" if len(chain.history) == 1 else "ready",
    ]
    assert (states["fold 0 predict"], states["record"]) == ("waiting", "waiting")


def test_the_claim_of_an_epoch_that_a_commit_is_within_has_a_higher_fence_than_the_commit(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    world.queue.adopt(trained(1, fence=9, is_within=True), now=world.now)
    assert world.find("full fold 0 epoch 1").fence == 0
    lease = world.take(session, loaded=(1, 0))
    assert (lease.job.epoch, lease.fence) == (2, 10)


def test_a_fold_on_which_a_lease_is_held_is_left_alone_and_nothing_is_published(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    lease = world.take(session)
    before = world.queue.jobs()
    assert not world.queue.adopt(trained(2), now=world.now, publish=lambda: pytest.fail("published"))
    assert world.queue.jobs() == before
    world.commit(lease)


def test_when_publishing_fails_nothing_is_adopted(world):
    world.prepared(world.session(), folds=(0,), epochs=3)
    before, events = world.queue.jobs(), world.queue.events()

    def publish():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        world.queue.adopt(trained(2), now=world.now, publish=publish)
    assert (world.queue.jobs(), world.queue.events()) == (before, events)


def test_a_finished_commit_replaces_a_failed_epoch_but_not_a_cancelled_one(world):
    session = world.session()
    world.prepared(session, folds=(0,), epochs=3)
    world.queue.fail(world.take(session), error="boom", now=world.now, final=True)
    world.queue.adopt(trained(1), now=world.now)
    assert world.find("full fold 0 epoch 1").state is State.COMMITTED
    world.queue.cancel("full", now=world.now)
    world.queue.adopt(trained(3), now=world.now)
    assert world.find("full fold 0 epoch 2").state is State.CANCELLED


def test_a_chain_without_patience_left_skips_the_remaining_epochs(world):
    world.prepared(world.session(), folds=(0,), epochs=3)
    world.queue.adopt(trained(1, skip_rest=True), now=world.now)
    states = world.states()
    assert [states[f"fold 0 epoch {epoch}"] for epoch in (1, 2, 3)] == ["committed", "skipped", "skipped"]
    assert states["fold 0 predict"] == "ready"


def test_an_experiment_that_is_not_there_is_an_error(world):
    with pytest.raises(UsageError, match="no experiment full"):
        world.queue.adopt(trained(1), now=world.now)


def test_a_result_is_adopted_once_all_that_it_needs_is_done(world):
    world.enqueue(folds=(0,), epochs=1)
    adopt = world.queue.adopt_result
    assert not adopt("full", Kind.PREDICT, fold=0, result={"test_mae": 0.1}, source="drive", now=world.now)
    assert adopt("full", Kind.PREPARE, result={"dataset_hash": "d" * 64}, source="drive", now=world.now)
    assert world.queue.experiment("full").dataset_hash == "d" * 64
    world.queue.adopt(trained(1), now=world.now)
    assert adopt("full", Kind.PREDICT, fold=0, result={"test_mae": 0.1}, source="drive", now=world.now)
    assert not adopt("full", Kind.PREDICT, fold=0, result={"test_mae": 0.2}, source="drive", now=world.now)
    assert world.find("full fold 0 predict").result == {"test_mae": 0.1}
    assert world.find("full record").state is State.READY


def test_a_preparation_of_other_crystals_is_refused(world):
    session = world.session()
    world.prepared(session, folds=(0,))
    world.queue.rewind("full", {0: "test"}, to_epoch=0, now=world.now)
    with world.queue.writing() as db:
        db.execute(
            "UPDATE jobs SET state = 'waiting', result = NULL, changed_at = 0, changed_by = '', changed_why = '' "
            "WHERE kind = 'prepare'"
        )
    with pytest.raises(QueueError, match="different crystals"):
        world.queue.adopt_result("full", Kind.PREPARE, result={"dataset_hash": "e"}, source="drive", now=world.now)


def test_a_session_that_was_seen_elsewhere_keeps_its_folds_while_it_lives(world):
    here = world.session()
    world.prepared(here, folds=(0, 1), epochs=2)
    there = seen("there", alive_until=world.now + 60)
    world.queue.see_session(there, folds=[("full", 0), ("unknown", 0)], now=world.now)
    row = world.queue.session("there")
    assert (row.host, row.alive_until, row.ended_at) == ("elsewhere", world.now + 60, None)
    lease = world.take(here)
    assert lease.job.fold == 1
    world.queue.release(lease, reason="test", now=world.now)
    world.queue.cancel("full", fold=1, now=world.now)
    assert world.claim(here) is None
    world.now += 61
    assert world.take(world.session()).job.fold == 0


def test_a_session_that_is_seen_again_counts_as_live_although_it_was_ended_here(world):
    world.queue.see_session(seen("there", alive_until=world.now + 60), folds=[], now=world.now)
    world.queue.end_session("there", reason="silent", now=world.now)
    world.queue.see_session(seen("there", alive_until=world.now + 90), folds=[], now=world.now)
    assert world.queue.session("there").is_live(world.now + 80)


def test_a_clock_elsewhere_that_is_far_ahead_keeps_no_fold_for_ever(world):
    world.queue.see_session(seen("there", alive_until=world.now + 1e9), folds=[], now=world.now)
    assert world.queue.session("there").alive_until == world.now + LONGEST_LEASE_SECONDS


def test_in_a_copy_every_session_ends_and_its_jobs_are_released_uncounted(world):
    one, two = world.session(), world.session()
    world.prepared(one, folds=(0, 1), epochs=2)
    leases = [world.take(one), world.take(two)]
    assert world.queue.end_all_sessions(reason="a copy", now=world.now, by="restore") == 2
    assert world.queue.end_all_sessions(reason="a copy", now=world.now, by="restore") == 0
    for lease in leases:
        job = world.queue.job(lease.job.id)
        assert (job.state, job.affinity, job.preemptions, job.lost_in_a_row) == (State.READY, None, 0, 0)
        assert job.changed_why == "lease released: a copy"
    with pytest.raises(QueueError, match="has ended"):
        world.claim(one)

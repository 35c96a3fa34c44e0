"""Enqueue experiments."""

from __future__ import annotations

import pytest

from mbqueue.errors import ExperimentExists, UsageError
from mbqueue.queue import Outcome


def test_a_new_experiment_has_a_chain_of_epochs_for_every_fold(world):
    outcome = world.enqueue(folds=(1, 3), epochs=2)
    assert (outcome.outcome, outcome.folds, outcome.n_jobs) == (Outcome.CREATED, (1, 3), 8)
    assert list(world.states()) == [
        "prepare",
        "fold 1 epoch 1",
        "fold 1 epoch 2",
        "fold 1 predict",
        "fold 3 epoch 1",
        "fold 3 epoch 2",
        "fold 3 predict",
        "record",
    ]


def test_only_prepare_is_ready_at_first(world):
    world.enqueue()
    assert [label for label, state in world.states().items() if state == "ready"] == ["prepare"]


def test_an_experiment_without_epochs_predicts_right_after_prepare(world):
    world.enqueue(epochs=0, folds=(0, 2))
    done = world.finish(world.session())
    assert done == ["full prepare", "full fold 0 predict", "full fold 2 predict", "full record"]


def test_enqueueing_the_same_experiment_twice_changes_nothing(world):
    first = world.enqueue()
    events = world.queue.events()
    again = world.enqueue()
    assert again.outcome is Outcome.UNCHANGED
    assert again.experiment == first.experiment
    assert world.queue.events() == events


def test_enqueueing_fewer_folds_changes_nothing(world):
    world.enqueue(folds=(0, 1))
    assert world.enqueue(folds=(1,)).outcome is Outcome.UNCHANGED


def test_a_changed_spec_under_the_same_name_is_refused_with_the_keys_that_differ(world):
    world.enqueue(lr=3e-4)
    before = world.queue.jobs()
    with pytest.raises(ExperimentExists) as caught:
        world.enqueue(lr=1e-3, batch_size=32)
    message = str(caught.value)
    assert "train.lr: 0.0003 in the queue, 0.001 now" in message
    assert "train.batch_size: 64 in the queue, 32 now" in message
    assert "epochs" not in message
    assert world.queue.jobs() == before


def test_a_name_that_is_taken_is_refused_with_one_that_is_free(world):
    world.enqueue(name="full")
    world.enqueue(name="full-2")
    world.queue.cancel("full", now=world.now)
    with pytest.raises(ExperimentExists, match="Enqueue the new one with --name full-3"):
        world.enqueue(name="full", lr=1e-4)


def test_added_folds_run_and_record_covers_them(world):
    session = world.session()
    world.enqueue(folds=(0,))
    world.finish(session)
    outcome = world.enqueue(folds=(0, 2))
    assert (outcome.outcome, outcome.folds) == (Outcome.FOLDS_ADDED, (2,))
    assert outcome.experiment.spec["folds"] == [0, 2]
    assert world.states()["record"] == "waiting"
    assert world.states()["fold 2 epoch 1"] == "ready"
    assert world.finish(session) == ["full fold 2 epoch 1", "full fold 2 epoch 2", "full fold 2 predict", "full record"]


def test_folds_added_to_a_paused_experiment_are_paused(world):
    session = world.session()
    world.prepared(session, folds=(0,))
    world.queue.pause("full", now=world.now)
    world.enqueue(folds=(0, 1))
    assert world.claim(session) is None


def test_folds_added_while_record_runs_rewind_record(world):
    session = world.session()
    world.enqueue(folds=(0,), epochs=0)
    world.commit(world.take(session))
    world.commit(world.take(session))
    record = world.take(session)
    assert record.job.kind == "record"
    world.enqueue(folds=(0, 1), epochs=0)
    assert world.states()["record"] == "waiting"


def test_two_experiments_never_share_a_results_folder(world):
    world.queue.enqueue(world.spec("one"), results_dir="results/same", now=world.now)
    with pytest.raises(UsageError, match="one already writes its results to results/same"):
        world.queue.enqueue(world.spec("two"), results_dir="results/same", now=world.now)
    assert [experiment.name for experiment in world.queue.experiments()] == ["one"]


def test_an_experiment_keeps_its_spec_unchanged(world):
    spec = world.spec(lr=1.2345e-4)
    world.queue.enqueue(spec, results_dir="results/full", now=world.now, priority=3)
    experiment = world.queue.experiment("full")
    assert experiment.spec == spec.to_json()
    assert (experiment.spec_hash, experiment.priority, experiment.dataset_hash) == (spec.hash, 3, None)
    assert world.queue.experiment_of(experiment.id) == experiment


def test_an_unknown_experiment_is_an_error_that_lists_the_known_ones(world):
    world.enqueue("mine")
    with pytest.raises(UsageError, match=r"There is no experiment yours in the queue\. The queue has: mine"):
        world.queue.experiment("yours")

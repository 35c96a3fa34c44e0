"""A search on two machines with one drive: each has a queue of its own, and they meet through what they publish."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_training import STEPS, FakeSession
from recorded_search import enqueue, make_search
from small_project import ManualClock

from mbqueue.project import init_project
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.jobs import Job, Kind
from mbqueue.queue.store import Queue
from mbqueue.search.trials import TrialState, trials_of
from mbqueue.session.searching import begin_trials

TRIALS, EPOCHS = 4, 3
#: Few settings, all of which the experiment takes.
SPACE = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}


PRUNED_TRIALS = {"hunt.001", "hunt.003"}
ENDED = {f"hunt.{number:03d}": 1 if number % 2 else EPOCHS for number in range(TRIALS)}


class SearchSession(FakeSession):
    """A session that begins trials and prunes them, as `mbqueue work` does."""

    def place(self) -> Any:
        """What of a `Workplace` beginning a trial asks."""
        return SimpleNamespace(
            project=self.project,
            queue=self.queue,
            session=self.id,
            clock=self.clock,
            publisher=self.publisher,
            note_once=self.notes.append,
            report=SimpleNamespace(note=self.notes.append),
        )

    def step(self) -> bool:
        if self.lease is None:
            begin_trials(self.place())
        before = self.lease
        was_done = super().step()
        if before is not None and self.lease is None and before.job.kind is Kind.TRAIN:
            self._judge(before.job)
        return was_done

    def _judge(self, job: Job) -> None:
        """Every other trial is pruned after its first epoch, by whoever trained that."""
        if job.epoch == 1 and job.experiment in PRUNED_TRIALS:
            self.queue.prune(job.experiment, why=f"{PRUNED}test", now=self.clock.now())


def known(queue: Queue) -> dict[str, Any]:
    found = trials_of(queue.overview(now=0.0), "hunt")
    return {trial.experiment: (dict(trial.settings), trial.state, dict(trial.curves)) for trial in found}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def work_by_turns(clock: ManualClock, sessions: list[SearchSession], turns: int = 200) -> None:
    """Until all of them know every trial as ended, or for so many turns."""
    over = {TrialState.DONE, TrialState.PRUNED}
    for _ in range(turns):
        for session in sessions:
            clock.advance(20.0)
            session.step()
            session.publish()
        found = [known(session.queue) for session in sessions]
        if all(len(one) == TRIALS and {state for _, state, _ in one.values()} <= over for one in found):
            return


def test_two_machines_with_one_drive_share_a_search_and_neither_lose_nor_double_a_trial(tmp_path, clock):
    root = tmp_path / "drive"
    init_project(root)
    first = SearchSession(root, tmp_path / "live1", clock)
    enqueue(first.queue, make_search(trials=TRIALS, epochs=EPOCHS, reduction=2, space=SPACE))
    first.publish()
    clock.advance(20.0)
    second = SearchSession(root, tmp_path / "live2", clock)
    work_by_turns(clock, [first, second])
    ours, theirs = known(first.queue), known(second.queue)
    assert ours == theirs
    assert {name: len(curves[0]) for name, (_, _, curves) in ours.items()} == ENDED
    assert {name for name, (_, state, _) in ours.items() if state is TrialState.PRUNED} == PRUNED_TRIALS
    assert min(first.steps_trained, second.steps_trained) > 0
    # A drive excludes nobody: until the two meet, they may train an epoch of one trial both.
    assert first.steps_trained + second.steps_trained < 1.5 * sum(ENDED.values()) * STEPS
    for session in (first, second):
        session.end()
    new = FakeSession(root, tmp_path / "live3", clock)
    assert known(new.queue) == ours


def test_a_search_outlives_the_machine_that_began_its_trials(tmp_path, clock):
    root = tmp_path / "drive"
    init_project(root)
    first = SearchSession(root, tmp_path / "live1", clock)
    enqueue(first.queue, make_search(trials=TRIALS, epochs=EPOCHS, reduction=2, space=SPACE))
    first.publish()
    clock.advance(20.0)
    second = SearchSession(root, tmp_path / "live2", clock)
    work_by_turns(clock, [first, second], 10)
    begun = len(known(first.queue))
    assert 1 < begun < TRIALS
    place = second.place()
    begin_trials(place)
    assert len(known(second.queue)) <= begun, "both began trials"
    clock.advance(3600.0)  # the first is gone, and nobody ends it
    work_by_turns(clock, [second])
    found = known(second.queue)
    assert {name: len(curves[0]) for name, (_, _, curves) in found.items()} == ENDED

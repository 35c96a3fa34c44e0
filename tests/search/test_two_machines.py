"""A search on two machines with one drive: each has its own queue, and they cooperate through what they publish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from recorded_search import enqueue, make_search
from small_project import ManualClock
from stepped_session import STEPS, SteppedSession, tiny_spec

from mbqueue.drive.publishing import Publisher
from mbqueue.experiment import Spec
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.store import Queue
from mbqueue.search import steps
from mbqueue.search.trials import TrialState, trials_of
from mbqueue.session import train

TRIALS, EPOCHS = 3, 3
PRUNED_TRIALS = {"hunt.001"}
ENDED = {f"hunt.{number:03d}": 1 if number % 2 else EPOCHS for number in range(TRIALS)}


@pytest.fixture(autouse=True)
def _every_other_trial_is_pruned_after_its_first_epoch() -> Iterator[None]:
    def verdict(_place: object, spec: Spec, _fold: int, history: list[Any]) -> str | None:
        return f"{PRUNED}test" if spec.name in PRUNED_TRIALS and len(history) == 1 else None

    with mock.patch.object(train, "verdict", verdict):
        yield


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def root(tmp_path: Path, clock: ManualClock) -> Path:
    """A project on a drive, with a search that a lost machine enqueued."""
    root = init_project(tmp_path / "drive")[0].root
    gone = ProjectFolder(root, Settings(), tmp_path / "gone")
    gone.live_dir.mkdir()
    space = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    with Queue(gone.queue_db) as queue:
        enqueue(queue, make_search(base=tiny_spec(folds=(0,), epochs=EPOCHS), space=space, trials=TRIALS))
    assert Publisher(gone, None, note=lambda _text: None, clock=clock).round()
    return root


def known(session: SteppedSession) -> dict[str, Any]:
    found = trials_of(session.queue.overview(now=0.0), "hunt")
    return {trial.experiment: (dict(trial.settings), trial.state, dict(trial.curves)) for trial in found}


def epochs(found: dict[str, Any]) -> dict[str, int]:
    return {name: len(curves[0]) for name, (_, _, curves) in found.items()}


def work_by_turns(clock: ManualClock, sessions: list[SteppedSession], turns: int = 200) -> None:
    """Let the sessions take turns until each knows that all trials have ended, for at most ``turns`` turns."""
    over = {TrialState.DONE, TrialState.PRUNED}
    for _ in range(turns):
        for session in sessions:
            clock.advance(20.0)
            session.step()
            session.publish()
        found = [known(session) for session in sessions]
        if all(len(one) == TRIALS and {state for _, state, _ in one.values()} <= over for one in found):
            return


def start_two(root: Path, tmp_path: Path, clock: ManualClock) -> list[SteppedSession]:
    first = SteppedSession(root, tmp_path / "live1", clock)
    clock.advance(20.0)
    return [first, SteppedSession(root, tmp_path / "live2", clock)]


def test_two_machines_with_one_drive_share_a_search_and_neither_lose_nor_repeat_a_trial(root, tmp_path, clock):
    first, second = start_two(root, tmp_path, clock)
    begun, begin = set(), steps.begin_trials

    def noted(queue: Queue, **options: Any) -> list[str]:
        names = begin(queue, **options)
        begun.update({options["by"]} if names else ())
        return names

    with mock.patch.object(steps, "begin_trials", noted):
        work_by_turns(clock, [first, second])
    ours = known(first)
    assert ours == known(second)
    assert epochs(ours) == ENDED
    assert {name for name, (_, state, _) in ours.items() if state is TrialState.PRUNED} == PRUNED_TRIALS
    assert min(first.commits, second.commits) > 0
    assert begun == {first.id}, "the second could have drawn other settings for the same number"
    # Until the two sessions see each other on the drive, both may train the same epoch.
    assert first.steps_trained + second.steps_trained < 1.5 * sum(ENDED.values()) * STEPS
    for session in (first, second):
        session.end()
    assert known(SteppedSession(root, tmp_path / "live3", clock)) == ours


def test_a_search_survives_the_loss_of_the_machine_that_began_its_trials(root, tmp_path, clock):
    first, second = start_two(root, tmp_path, clock)
    while len(known(first)) == 1:
        work_by_turns(clock, [first, second], turns=1)
    begun = known(first)
    assert len(begun) < TRIALS
    first.die()
    clock.advance(3600.0)
    work_by_turns(clock, [second])
    found = known(second)
    assert epochs(found) == ENDED
    assert {name: found[name][0] for name in begun} == {name: settings for name, (settings, _, _) in begun.items()}

"""Two machines on a drive see each other too late and give one trial number to different settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recorded_search import enqueue, make_search
from small_project import ManualClock
from stepped_session import SteppedSession, tiny_spec

from mbqueue.drive.announcements import Announcements
from mbqueue.drive.publishing import Publisher
from mbqueue.experiment import hash_of_spec
from mbqueue.project import ProjectFolder, Settings, init_project
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.store import Queue
from mbqueue.search import steps
from mbqueue.search.trials import TrialState, trials_of
from mbqueue.session import train

TRIAL = "hunt.001"


def state_of(session: SteppedSession) -> TrialState | None:
    trials = trials_of(session.queue.overview(now=0.0), "hunt")
    return next((one.state for one in trials if one.experiment == TRIAL), None)


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """A drive with a search that a lost machine enqueued."""
    root = init_project(tmp_path / "drive")[0].root
    gone = ProjectFolder(root, Settings(), tmp_path / "gone")
    gone.live_dir.mkdir()
    space = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    with Queue(gone.queue_db) as queue:
        enqueue(queue, make_search(base=tiny_spec(folds=(0,), epochs=3), space=space, trials=3))
    assert Publisher(gone, None, note=lambda _text: None, clock=ManualClock()).round()
    return root


class Pair:
    """Two sessions that choose different settings for the same trial."""

    def __init__(self, drive: Path, folder: Path, patch: pytest.MonkeyPatch, *, first_prunes: bool) -> None:
        self.drive, self.clock, self.patch = drive, ManualClock(), patch
        begin, next_settings = steps.begin_trials, steps.next_settings
        beginner = ""

        def begun_by(queue: Queue, **options: Any) -> Any:
            nonlocal beginner
            beginner = options["by"]
            return begin(queue, **options)

        def drawn(search: Any, trials: Any) -> Any:
            found = next_settings(search, trials)
            return found and {"train.lr": found["train.lr"] * (1.1 if beginner == self.second.id else 1.0)}

        def verdict(session: Any, spec: Any, _fold: int, history: list[Any]) -> str | None:
            prunes = first_prunes and spec.name == TRIAL and session.id == self.first.id and len(history) == 1
            return f"{PRUNED}it was bad" if prunes else None

        patch.setattr(steps, "begin_trials", begun_by)
        patch.setattr(steps, "next_settings", drawn)
        patch.setattr(train, "verdict", verdict)
        self.first = SteppedSession(drive, folder / "live1", self.clock)
        self.clock.advance(20.0)
        self.second = SteppedSession(drive, folder / "live2", self.clock)

    def states(self) -> tuple[TrialState | None, TrialState | None]:
        return state_of(self.first), state_of(self.second)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            for session in (self.first, self.second):
                self.clock.advance(20.0)
                session.step()
                session.publish()

    def work_unseen_until(self, *states: TrialState) -> None:
        """Let both sessions work, unaware of each other, until the trial has these states on the two machines."""
        with self.patch.context() as unseen:
            unseen.setattr(Announcements, "others", lambda _self: [])
            for _ in range(60):
                self.turn()
                if self.states() == states:
                    return
        raise AssertionError(self.states())

    def recorded(self) -> Any:
        """The trial's spec in the results on the drive."""
        (path,) = self.drive.glob(f"results/daily/*/{TRIAL}/results.json")
        return json.loads(path.read_bytes())["spec"]


def test_a_trial_that_one_machine_gives_up_keeps_the_commits_of_the_other(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(drive, tmp_path, monkeypatch, first_prunes=True)
    pair.work_unseen_until(TrialState.PRUNED, TrialState.DONE)
    pair.turn(10)
    of_second = pair.second.queue.experiment(TRIAL).spec
    assert pair.recorded() == of_second
    pair.second.end()
    pair.clock.advance(25 * 3600.0)
    for _ in range(12):
        pair.clock.advance(300.0)
        pair.first.step()
        pair.first.publish()
    manifests = [json.loads(path.read_bytes()) for path in drive.glob(f"state/checkpoints/{TRIAL}/fold_0/*.json")]
    assert {one["spec_hash"] for one in manifests} == {hash_of_spec(of_second)}
    pair.first.end()


def test_a_trial_that_one_machine_prunes_continues_with_the_settings_of_the_other(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(drive, tmp_path, monkeypatch, first_prunes=True)
    pair.work_unseen_until(TrialState.PRUNED, TrialState.OPEN)
    pair.turn(20)
    assert state_of(pair.second) is not TrialState.PRUNED
    pair.first.end()
    pair.second.end()


def test_recorded_results_of_a_trial_are_not_replaced_by_those_of_other_settings(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(drive, tmp_path, monkeypatch, first_prunes=False)
    pair.work_unseen_until(TrialState.DONE, TrialState.DONE)
    specs = [session.queue.experiment(TRIAL).spec for session in (pair.first, pair.second)]
    assert specs[0] != specs[1]
    assert pair.recorded() == specs[0], "the first machine recorded it first"
    pair.turn(10)
    assert pair.recorded() == specs[0]
    pair.first.end()
    pair.second.end()

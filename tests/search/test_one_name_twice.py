"""Two machines of a drive that do not see each other in time and give one trial number to different settings."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from recorded_search import enqueue, make_search
from small_project import ManualClock
from stepped_session import SteppedSession, tiny_spec

from mbqueue.drive.announce import Announcements
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
    """A drive with a search that a machine enqueued which is gone."""
    root = init_project(tmp_path / "drive")[0].root
    gone = ProjectFolder(root, Settings(), tmp_path / "gone")
    gone.live_dir.mkdir()
    space = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    with Queue(gone.queue_db) as queue:
        enqueue(queue, make_search(base=tiny_spec(folds=(0,), epochs=3), space=space, trials=3))
    assert Publisher(gone, None, note=lambda _text: None, clock=ManualClock()).round()
    return root


def test_a_trial_that_one_machine_prunes_stays_done_on_the_other_with_other_settings(
    tmp_path: Path, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    begin, next_settings = steps.begin_trials, steps.next_settings
    beginner = ""

    def begun_by(queue: Queue, **options: Any) -> Any:
        nonlocal beginner
        beginner = options["by"]
        return begin(queue, **options)

    def drawn(search: Any, trials: Any) -> Any:
        found = next_settings(search, trials)
        return found and {"train.lr": found["train.lr"] * (1.1 if beginner == second.id else 1.0)}

    def verdict(session: Any, spec: Any, _fold: int, history: list[Any]) -> str | None:
        prunes = spec.name == TRIAL and session.id == first.id and len(history) == 1
        return f"{PRUNED}it was bad" if prunes else None

    monkeypatch.setattr(steps, "begin_trials", begun_by)
    monkeypatch.setattr(steps, "next_settings", drawn)
    monkeypatch.setattr(train, "verdict", verdict)
    first = SteppedSession(drive, tmp_path / "live1", clock)
    clock.advance(20.0)
    second = SteppedSession(drive, tmp_path / "live2", clock)
    with monkeypatch.context() as unseen:
        unseen.setattr(Announcements, "others", lambda _self: [])
        for _ in range(60):
            for session in (first, second):
                clock.advance(20.0)
                session.step()
                session.publish()
            if (state_of(first), state_of(second)) == (TrialState.PRUNED, TrialState.DONE):
                break
    for session in itertools.islice(itertools.cycle((first, second)), 20):
        clock.advance(20.0)
        session.step()
        session.publish()
    assert state_of(second) is TrialState.DONE
    (recorded,) = drive.glob(f"results/daily/*/{TRIAL}/results.json")
    of_second = second.queue.experiment(TRIAL).spec
    assert json.loads(recorded.read_bytes())["spec"] == of_second
    second.end()
    clock.advance(25 * 3600.0)
    for _ in range(20):
        clock.advance(60.0)
        first.step()
        first.publish()
    manifests = [json.loads(path.read_bytes()) for path in drive.glob(f"state/checkpoints/{TRIAL}/fold_0/*.json")]
    assert {one["spec_hash"] for one in manifests} >= {hash_of_spec(of_second)}
    first.end()

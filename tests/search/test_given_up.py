"""Checkpoints of pruned trials are removed everywhere, and stay removed after any kind of loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from recorded_search import enqueue, make_search
from small_project import ManualClock
from stepped_session import LocalProject, SteppedSession, tiny_spec

from mbqueue import Project
from mbqueue.drive.notes import keep_note
from mbqueue.drive.recovery import recover
from mbqueue.drive.retention import SETTLED_SECONDS
from mbqueue.experiment import Spec
from mbqueue.project import ProjectFolder, init_project
from mbqueue.queue.edges import PRUNED
from mbqueue.queue.jobs import Kind, State
from mbqueue.queue.opening import open_on_server
from mbqueue.queue.store import Queue
from mbqueue.search import steps
from mbqueue.search.file import Search
from mbqueue.search.trials import TrialState, trials_of
from mbqueue.session import train
from mbqueue.session.commits_binding import known_epochs, lacking
from mbqueue.session.shared_commits import finished_epochs, remove_released, send_fold
from mbqueue.storage.objects import ObjectStore

NAMES = ["hunt.000", "hunt.001"]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def make_trials(queue: Queue) -> None:
    """A search with two trials of two epochs each."""
    space = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    search = make_search(base=tiny_spec(folds=(0,)), space=space, trials=2)
    enqueue(queue, search)
    steps.begin_trials(queue, results_dir=lambda name: f"results/{name}", now=0.0, by="test")
    second = steps.trial_spec(search, trials_of(queue.overview(now=0.0), "hunt"))
    assert second is not None
    queue.enqueue(second, results_dir="results/hunt.001", now=0.0)


def train_and_prune(session: SteppedSession) -> None:
    """Train one epoch of each trial, after which the first is pruned."""

    def verdict(_place: object, spec: Spec, _fold: int, _history: object) -> str | None:
        return f"{PRUNED}test" if spec.name == NAMES[0] else None

    with mock.patch.object(train, "verdict", verdict):
        while not all(committed(session.queue, name) for name in NAMES):
            session.clock.advance(1.0)
            assert session.step()


def committed(queue: Queue, name: str) -> list[int | None]:
    return [job.epoch for job in queue.jobs(experiment=name, state=State.COMMITTED) if job.kind is Kind.TRAIN]


def give_up(project: ProjectFolder, queue: Queue, clock: ManualClock, store: ObjectStore | None = None) -> None:
    """An hour after the trial was pruned, remove its checkpoints as a session does."""
    clock.advance(3600.0)
    names = steps.release_pruned(queue, after_seconds=3600.0, now=clock.now(), by="test")
    assert names == NAMES[:1]
    keep_note(project, queue, NAMES[0])
    remove_released(project, [queue.experiment(NAMES[0])], store)


def known(queue: Queue) -> list[Any]:
    found = trials_of(queue.overview(now=0.0), "hunt")
    return [(trial.experiment, dict(trial.settings), trial.state, dict(trial.curves)) for trial in found]


@pytest.fixture
def local(tmp_path: Path, clock: ManualClock) -> tuple[ProjectFolder, SteppedSession]:
    """A project on a local disk with a pruned trial."""
    found = LocalProject(tmp_path / "project", clock)
    with Queue(found.project.queue_db) as queue:
        queue.cancel("tiny", now=clock.now())
        make_trials(queue)
    session = found.train(0)
    train_and_prune(session)
    return found.project, session


def folders(project: ProjectFolder) -> list[str]:
    return [folder.parent.name for folder in project.fold_dirs()]


def test_local_checkpoints_are_removed_and_recover_still_restores_the_trial(local, clock):
    project, session = local
    for name in NAMES:
        keep_note(project, session.queue, name)
    assert folders(project) == NAMES
    give_up(project, session.queue, clock)
    assert folders(project) == NAMES[1:]
    before = known(session.queue)
    assert before[0][2:] == (TrialState.PRUNED, {0: before[0][3][0]})
    assert len(before[0][3][0]) == 1
    session.die()
    project.queue_db.unlink()
    recover(project, force=False, note=session.notes.append, clock=clock)
    with Queue(project.queue_db) as queue:
        assert known(queue) == before


def test_checkpoints_left_by_a_death_are_removed_by_the_next_session(local, clock):
    project, session = local
    give_up(project, session.queue, clock)
    left = project.checkpoints_dir(NAMES[0], 0)
    left.mkdir(parents=True)
    for path in project.checkpoints_dir(NAMES[1], 0).iterdir():
        shutil.copy(path, left)
    remove_released(project, [trial for trial in session.queue.trials() if trial.is_released], None)
    assert folders(project) == NAMES[1:]


def test_retry_says_that_it_starts_from_the_beginning(local, clock, monkeypatch):
    project, session = local
    give_up(project, session.queue, clock)
    told: list[str] = []
    monkeypatch.setattr("mbqueue.api.queueing.tell", told.append)
    assert Project(project.root).retry(NAMES[0])
    assert told == [
        "The checkpoints of hunt.000 were removed after the trial was pruned (pruned_hours in mbqueue.toml), so the "
        "trial starts from the beginning."
    ]
    assert committed(session.queue, NAMES[0]) == []
    assert Project(project.root).retry(NAMES[0]) == 0
    assert len(told) == 1


def test_checkpoints_in_a_store_are_removed_and_nothing_needs_them(local, clock, tmp_path):
    project, session = local
    (tmp_path / "store").mkdir()
    store = ObjectStore.open((tmp_path / "store").as_uri())
    store.check()
    for name in NAMES:
        assert send_fold(project, store, session.queue.experiment(name), 0, 1, session.notes.append)
    assert finished_epochs(store) == {(name, 0): 1 for name in NAMES}
    give_up(project, session.queue, clock, store)
    assert finished_epochs(store) == {(NAMES[1], 0): 1}
    assert not [name for name in store.names("") if NAMES[0] in name]
    assert (NAMES[0], 0) not in known_epochs(session.queue)
    assert lacking(session.queue, finished_epochs(store)) == ""


@pytest.mark.parametrize("given_up", [False, True])
def test_an_archive_contains_the_search(local, clock, tmp_path, given_up):
    project, session = local
    if given_up:
        give_up(project, session.queue, clock)
    session.end()
    before = known(session.queue)
    Project(project.root).back_up(tmp_path / "all.tar")
    other = Project.create(tmp_path / "other")
    other.restore(tmp_path / "all.tar")
    with Queue(other.folder.queue_db) as queue:
        assert known(queue) == before
        assert [trial.is_released for trial in queue.trials()] == [given_up, False]
    assert folders(other.folder) == (NAMES[1:] if given_up else NAMES)


def test_a_search_that_moves_to_a_server_continues_unchanged(local, clock, postgres_server):
    project, session = local
    give_up(project, session.queue, clock)
    session.end()
    before, search = known(session.queue), Search.model_validate(session.queue.trials()[0].spec["trial"]["search"])
    following = steps.trial_spec(search, trials_of(session.queue.overview(now=0.0), "hunt"))
    url = postgres_server.url()
    Project(project.root).migrate_queue(url)
    with open_on_server(url) as queue:
        assert known(queue) == before
        assert [trial.is_released for trial in queue.trials()] == [True, False]
        assert steps.trial_spec(search, trials_of(queue.overview(now=0.0), "hunt")) == following
        assert queue.retry(NAMES[0], now=clock.now())
        assert committed(queue, NAMES[0]) == []


def test_a_drive_loses_checkpoints_after_the_snapshot_and_a_new_machine_knows_the_trial(tmp_path, clock):
    root = tmp_path / "drive"
    init_project(root)
    (tmp_path / "live").mkdir()
    with Queue(tmp_path / "live" / "queue.db") as queue:
        make_trials(queue)
    session = SteppedSession(root, tmp_path / "live", clock)
    train_and_prune(session)
    assert session.publish()

    def on_drive() -> list[str]:
        return sorted({path.parent.parent.name for path in root.rglob("*.pt")})

    assert on_drive() == NAMES
    give_up(session.project, session.queue, clock)
    clock.advance(60.0)
    assert session.publish()
    assert on_drive() == NAMES, "a removal may reach the drive before the snapshot does"
    clock.advance(SETTLED_SECONDS)
    assert session.publish()
    assert on_drive() == NAMES[1:]
    before = known(session.queue)
    session.end()
    shutil.rmtree(tmp_path / "live")
    new = SteppedSession(root, tmp_path / "new", clock)
    assert known(new.queue) == before
    assert new.publish()
    assert on_drive() == NAMES[1:]

"""Real sessions that die or freeze: no result changes by one bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from processes import PATIENCE_SECONDS, freeze, kill, outcome, run, start, until, warm
from small_project import enqueue, make_project, small_spec
from warm import Child

from mbqueue.files import TEMP_PREFIX
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue

WORK_LEFT = 75


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, list[dict[str, object]]]:
    """The results of an uninterrupted session on the small experiment."""
    project = make_project(tmp_path_factory.mktemp("straight"), checkpoint_minutes=60.0)
    folder = enqueue(project, small_spec(project))
    done = run(project.root, "work", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return outcome(folder, 0)


def commits(project: ProjectFolder) -> int:
    """The commits of fold 0."""
    return len(list(project.checkpoints_dir("full_finetune", 0).glob("e*.json")))


def files_being_written(project: ProjectFolder) -> int:
    """The number of temporary files of the commit of fold 0 that is being staged."""
    return len(list(project.checkpoints_dir("full_finetune", 0).glob(f"{TEMP_PREFIX}*")))


def until_a_new_commit(project: ProjectFolder, process: Child) -> None:
    """Wait until fold 0 has a new commit."""
    folder = project.checkpoints_dir("full_finetune", 0)
    newest = max(folder.glob("e*.json"), default=None)
    until(lambda: max(folder.glob("e*.json"), default=None) != newest, process)


def test_a_fold_killed_at_random_moments_equals_an_uninterrupted_one_byte_for_byte(
    tmp_path: Path, straight: tuple[bytes, bytes, list[dict[str, object]]]
) -> None:
    seed = int(os.environ.get("MBQUEUE_TEST_SEED", random.SystemRandom().randrange(10**6)))
    chance = random.Random(seed)
    project = make_project(tmp_path)  # a checkpoint after every step
    folder = enqueue(project, small_spec(project))
    log = tmp_path / "log"
    kills = []
    for death in range(3):
        process = start(project.root, "work", "--device", "cpu", log=log)
        before = commits(project)
        if death == 1:
            # While a checkpoint is being written, its files have temporary names.
            until(lambda: files_being_written(project) > 0, process)
        else:
            until_a_new_commit(project, process)
            if chance.random() < 0.5:
                until(lambda: files_being_written(project) > 0, process)
        kill(process)
        kills.append((before, commits(project)))
    last = run(project.root, "work", "--device", "cpu")
    assert last.returncode == 0, last.stderr
    assert outcome(folder, 0) == straight, f"MBQUEUE_TEST_SEED={seed}, commits before and after each death: {kills}"
    with Queue(project.queue_db, read_only=True) as queue:
        assert {job.state for job in queue.jobs()} == {State.COMMITTED}
        # A kill between two jobs does not preempt a job. The second kill is during a checkpoint, so it preempts a job.
        assert 1 <= sum(job.preemptions for job in queue.jobs()) <= 3
        assert sum(job.failures for job in queue.jobs()) == 0


def test_another_seed_gives_another_result(
    tmp_path: Path, straight: tuple[bytes, bytes, list[dict[str, object]]]
) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    folder = enqueue(project, small_spec(project, seed=1, data__limit=0, data__dataset=_same_crystals(tmp_path)))
    assert run(project.root, "work", "--device", "cpu").returncode == 0
    model, predictions, history = outcome(folder, 0)
    assert model != straight[0]
    assert predictions != straight[1]
    assert history != straight[2]


def _same_crystals(folder: Path) -> str:
    """Write 40 crystals of the sample into a file, so that the experiment's seed does not choose the crystals."""
    import gzip
    import json

    from mbqueue.data import datasets

    chosen = set(datasets.load("sample", limit=40, seed=0).crystals.ids)
    lines = gzip.decompress(datasets.SAMPLE_FILE.read_bytes()).splitlines(keepends=True)
    (folder / "same.jsonl").write_bytes(b"".join(line for line in lines if json.loads(line)["id"] in chosen))
    return "same.jsonl"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_session_gracefully_with_the_work_saved(tmp_path: Path, number: signal.Signals) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    enqueue(project, small_spec(project, train__epochs=50))
    process = start(project.root, "work", "--device", "cpu", log=tmp_path / "log")
    until(lambda: commits(project) > 0, process)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE_SECONDS) == WORK_LEFT, (tmp_path / "log").read_text()
    with Queue(project.queue_db, read_only=True) as queue:
        assert not queue.jobs(state=State.LEASED)
        (session,) = queue.sessions()
        assert session.end_reason == number.name


def test_a_worker_frozen_beyond_its_lease_changes_nothing_after_another_took_over(
    tmp_path: Path, straight: tuple[bytes, bytes, list[dict[str, object]]]
) -> None:
    project = make_project(tmp_path, lease_seconds=2.0)
    folder = enqueue(project, small_spec(project))
    log = tmp_path / "frozen.log"
    frozen = start(project.root, "work", "--device", "cpu", log=log)
    until(lambda: commits(project) > 0, frozen)
    freeze(frozen, project.queue_db)
    try:
        taking_over = run(project.root, "work", "--device", "cpu")
        assert taking_over.returncode == 0, taking_over.stderr
        before = _everything(project, folder)
    finally:
        frozen.send_signal(signal.SIGCONT)
    assert frozen.wait(timeout=60) == 0, log.read_text()
    assert "no longer holds" in log.read_text()
    assert _everything(project, folder) == before
    assert outcome(folder, 0) == straight


def _everything(project: ProjectFolder, folder: Path) -> tuple[object, ...]:
    """The state of each job, and every byte of checkpoints and results, except temporary files of dead sessions."""
    with Queue(project.queue_db, read_only=True) as queue:
        jobs = queue.jobs()
    places = (project.checkpoints_dir("full_finetune", 0), folder)
    named = [p for place in places for p in sorted(place.iterdir()) if not p.name.startswith(TEMP_PREFIX)]
    return jobs, {path: path.read_bytes() for path in named}


def test_workers_share_a_queue_and_take_different_folds(tmp_path: Path) -> None:
    project = make_project(tmp_path, checkpoint_minutes=60.0)
    folder = enqueue(project, small_spec(project, folds=[0, 1], data__limit=20, train__epochs=4))
    with Queue(project.queue_db) as queue:
        queue.pause("full_finetune", now=0.0)
        # With more workers than folds, an idle worker checks for jobs all the time.
        logs = [tmp_path / f"{name}.log" for name in ("first", "second", "third")]
        arguments = ("work", "--forever", "--device", "cpu")
        workers = [warm().start(project.root, arguments, log=log, patience=PATIENCE_SECONDS) for log in logs]
        until(lambda: len(queue.sessions()) == 3)
        queue.resume("full_finetune", now=0.0)
        until(lambda: all(job.state is State.COMMITTED for job in queue.jobs()), workers[0])
        for worker, log in zip(workers, logs, strict=True):
            worker.terminate()
            assert worker.wait(timeout=60) == WORK_LEFT, log.read_text()
        epochs = [e for e in queue.events(limit=10_000) if e.epoch and e.to_state is State.COMMITTED]
    assert len(epochs) == 8
    by = {fold: {event.by for event in epochs if event.fold == fold} for fold in (0, 1)}
    assert len(by[0]) == len(by[1]) == 1, "a worker trained an epoch of a fold whose worker lived"
    assert by[0] != by[1]
    assert (folder / "results.json").exists()

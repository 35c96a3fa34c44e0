"""The commands recover, backup and restore, with real sessions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import kill, outcome, run, start, until
from small_project import enqueue, make_project, small_spec

from mbqueue.files import sha256_of_json
from mbqueue.project import ProjectFolder
from mbqueue.queue.jobs import State
from mbqueue.queue.store import Queue

from .conftest import Command

SMALL = ("--dataset", "sample", "--set", "data.limit=40", "--epochs", "2")


def test_a_backup_made_beside_a_session_is_restored_elsewhere_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    straight = make_project(tmp_path / "straight", checkpoint_minutes=60.0)
    expected = enqueue(straight, small_spec(straight))
    assert run(straight.root, "work", "--device", "cpu").returncode == 0

    project = make_project(tmp_path / "here")  # by default, a session of this project commits after every step
    folder = enqueue(project, small_spec(project)).relative_to(project.root)
    checkpoints = project.checkpoints_dir("full_finetune", 0)
    session = start(project.root, "work", "--device", "cpu")
    until(lambda: any(checkpoints.glob("e*.json")), session)
    made = run(project.root, "backup", str(tmp_path / "b.tar"))
    assert made.returncode == 0, made.stderr
    assert session.poll() is None, "the session was over before the backup was"
    kill(session)

    elsewhere = tmp_path / "elsewhere"
    assert run(elsewhere, "init", str(elsewhere)).returncode == 0
    restored = run(elsewhere, "restore", str(tmp_path / "b.tar"))
    assert restored.returncode == 0, restored.stderr
    assert re.search(r"[12] commits? restored", restored.stdout), restored.stdout
    done = run(elsewhere, "work", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert outcome(elsewhere / folder, 0) == outcome(straight.root / expected, 0)


def states(project: ProjectFolder) -> dict[str, tuple[State, bool, int]]:
    with Queue(project.queue_db, read_only=True) as queue:
        return {job.label: (job.state, job.paused, job.priority) for job in queue.jobs()}


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_recover_restores_experiments_without_commits_and_pauses_cancellations_and_priorities(
    mbqueue: Command, project: ProjectFolder, loss: str
) -> None:
    for arguments in (
        ("enqueue", "head_finetune", *SMALL, "--folds", "0,1,2"),
        ("enqueue", "full_finetune", *SMALL, "--folds", "0,1", "--priority", "3"),
        ("enqueue", "pretrained_infer", "--dataset", "sample", "--folds", "0"),
        ("enqueue", "head_finetune", *SMALL, "--folds", "3"),
        ("pause", "head_finetune", "--fold", "1"),
        ("cancel", "head_finetune", "--fold", "2", "--yes"),
        ("priority", "head_finetune", "7", "--fold", "0"),
        ("pause", "full_finetune"),
        ("resume", "full_finetune", "--fold", "1"),
        ("cancel", "pretrained_infer", "--yes"),
    ):
        assert mbqueue(*arguments).code == 0, arguments
    before = states(project)
    if loss == "gone":
        for path in project.live_dir.glob("queue.db*"):
            path.unlink()
    else:
        project.queue_db.write_bytes(b"no database" * 1000)
    assert mbqueue("recover").code == 0
    assert states(project) == before


@pytest.mark.parametrize(
    "hostile",
    [
        lambda content: content | {"results_dir": "../../outside"},
        lambda content: content | {"spec": content["spec"] | {"name": "../outside"}},
        lambda content: content | {"priority": "high"},
        lambda content: content | {"folds": {"0": {}}},
        lambda _content: {},
    ],
    ids=["folder", "name", "priority", "fold", "empty"],
)
def test_a_damaged_or_hostile_record_of_an_experiment_is_skipped(
    mbqueue: Command, project: ProjectFolder, caplog: pytest.LogCaptureFixture, hostile: Callable[[dict], dict]
) -> None:
    assert mbqueue("enqueue", "full_finetune", *SMALL).code == 0
    assert mbqueue("enqueue", "head_finetune", *SMALL).code == 0
    path = project.notes_dir / "head_finetune.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    content = hostile(content)
    path.write_text(json.dumps(content | {"checksum": sha256_of_json(content)}))  # recompute the checksum
    project.queue_db.unlink()
    assert mbqueue("recover").code == 0
    assert "head_finetune.json is skipped: it is not a valid note of an experiment" in caplog.text
    with Queue(project.queue_db, read_only=True) as queue:
        assert [experiment.name for experiment in queue.experiments()] == ["full_finetune"]
